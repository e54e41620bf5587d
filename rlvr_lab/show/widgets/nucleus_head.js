// One next-token distribution: what does its head keep of the entropy, and when is the released head empty?

/** How many of the likeliest tokens form the head; `crossing`: with the token that crosses the mass. */
export function headSize(probabilities, mass, crossing) {
  let [size, reached] = [0, 0];
  for (const p of [...probabilities].sort((a, b) => b - a)) {
    if ((crossing ? reached : reached + p) >= mass) break;
    reached += p;
    size += 1;
  }
  return size;
}

/** Entropy in nats of the head, renormalised; 0 where it has no token or one. */
export function headEntropy(probabilities, mass, crossing) {
  const head = [...probabilities].sort((a, b) => b - a).slice(0, headSize(probabilities, mass, crossing));
  const total = head.reduce((sum, p) => sum + p, 0);
  return entropy(head.map((p) => p / total));
}

function render({ model, el }) {
  const [labels, logits] = [model.get("labels"), model.get("logits")];
  const chart = barChart("Probability of the next token", labels.map((label) => ({ label })));
  const kept = barChart("Head, renormalised", labels.map((label) => ({ label, hatched: true })));
  const output = liveOutput();
  const temperature = slider(
    "temperature",
    { min: 0.2, max: 3, step: 0.05, value: model.get("temperature") },
    (value) => value.toFixed(2),
  );
  const mass = slider("mass of the head", { min: 0.05, max: 1, step: 0.05, value: model.get("mass") }, (v) => v.toFixed(2));

  const draw = () => {
    const p = softmax(logits, Number(temperature.input.value));
    const m = Number(mass.input.value);
    const order = p.map((_, i) => i).sort((a, b) => p[b] - p[a]);
    const sizes = [true, false].map((crossing) => headSize(p, m, crossing));
    const head = new Set(order.slice(0, sizes[0]));
    const total = [...head].reduce((sum, i) => sum + p[i], 0);
    chart.draw(p);
    kept.draw(p.map((value, i) => (head.has(i) ? value / total : 0)));
    output.textContent =
      `Entropy: all tokens ${entropy(p).toFixed(3)} nats, head of ${sizes[0]} ${headEntropy(p, m, true).toFixed(3)}, ` +
      `released head of ${sizes[1]} ${headEntropy(p, m, false).toFixed(3)}.`;
  };
  for (const control of [temperature, mass]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, kept.root, temperature.root, mass.root, output);
  draw();
}

export default { render };
