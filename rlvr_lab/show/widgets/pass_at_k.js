// Unbiased pass@k (Chen et al., 2021) from the number of correct responses per problem.

/** 1 - C(n-c, k) / C(n, k), as a product so that no binomial coefficient overflows. */
export function passAtK(samples, correct, k) {
  if (samples - correct < k) return 1;
  let allWrong = 1;
  for (let i = samples - correct + 1; i <= samples; i += 1) allWrong *= 1 - k / i;
  return 1 - allWrong;
}

export function meanPassAtK(samples, counts, k) {
  return counts.reduce((sum, correct) => sum + passAtK(samples, correct, k), 0) / counts.length;
}

/** The smallest k at which the base policy is at least as good after the trained one was ahead; null if never. */
export function crossing(samples, base, trained, largest) {
  let wasAhead = false;
  for (let k = 1; k <= largest; k += 1) {
    const gap = meanPassAtK(samples, trained, k) - meanPassAtK(samples, base, k);
    if (gap > 1e-12) wasAhead = true;
    else if (wasAhead) return k;
  }
  return null;
}

const LARGEST = 64;

function render({ model, el }) {
  const samples = model.get("samples");
  const base = model.get("base");
  const trained = model.get("trained");
  const largest = Math.min(LARGEST, samples); // the estimator needs k <= n
  const meeting = crossing(samples, base, trained, largest);
  const where =
    meeting === null
      ? `The trained policy is not caught up to k = ${largest}.`
      : `The base policy has caught up at k = ${meeting}.`;

  const chart = barChart("pass@k, mean over problems", [{ label: "base policy", hatched: true }, { label: "trained policy" }]);
  const output = liveOutput();
  const knob = slider("k", { min: 1, max: largest, step: 1, value: model.get("k") }, (value) => String(value));
  const draw = () => {
    const k = Number(knob.input.value);
    const values = [base, trained].map((counts) => meanPassAtK(samples, counts, k));
    chart.draw(values);
    output.textContent =
      `pass@${k}: base ${values[0].toFixed(3)}, trained ${values[1].toFixed(3)} ` +
      `(${base.length} problems, ${samples} samples each). ${where}`;
  };
  knob.input.addEventListener("input", () => {
    model.set("k", Number(knob.input.value));
    model.save_changes();
    draw();
  });
  model.on("change:k", () => {
    knob.input.value = model.get("k");
    knob.update();
    draw();
  });

  el.classList.add("rlw");
  el.append(chart.root, knob.root, output);
  draw();
}

export default { render };
