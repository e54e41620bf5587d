// Imitation of one's own samples drawn at another temperature: which way does entropy go, with and without a verdict?
// One state, exact expectations: the step of the logits is q R - p sum(q R), with q the policy at temperature T.

/** Chance of success per action: the same for all at surer = 0, proportional to the policy's probability at 1. */
export function success(p, surer) {
  const top = Math.max(...p);
  return p.map((value) => 0.5 * (1 - surer) + (surer * value) / top);
}

/** Entropy change per unit step, in nats, to first order. */
export function drift(logits, temperature, rewards) {
  const p = softmax(logits);
  const h = entropy(p);
  const pull = softmax(logits, temperature).map((q, i) => q * rewards[i]);
  const total = pull.reduce((sum, value) => sum + value, 0);
  return -p.reduce((sum, value, i) => sum + value * (Math.log(value) + h) * (pull[i] - value * total), 0);
}

/** Temperature at which the drift is 0, between 0.2 and 20 by bisection; null where its sign is the same at both ends. */
export function balance(logits, rewards) {
  let [low, high] = [0.2, 20];
  if (drift(logits, low, rewards) * drift(logits, high, rewards) > 0) return null;
  for (let i = 0; i < 60; i += 1) {
    const middle = (low + high) / 2;
    if (drift(logits, middle, rewards) < 0) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

const signed = (value) => `${value < 0 ? "falls" : "rises"} by ${Math.abs(value).toFixed(3)}`;

function render({ model, el }) {
  const logits = model.get("logits");
  const p = softmax(logits);
  const rows = p.flatMap((_, i) => [
    { label: `${model.get("labels")[i]}, policy` },
    { label: "drawn at T and right", hatched: true },
  ]);
  const chart = barChart("Policy, and the share of draws that is imitated", rows);
  const output = liveOutput();
  const temperature = slider(
    "temperature T of the extra samples",
    { min: 0.5, max: 2.5, step: 0.05, value: model.get("temperature") },
    (value) => value.toFixed(2),
  );
  const surer = slider(
    "how far surer means righter",
    { min: 0, max: 1, step: 0.05, value: model.get("surer") },
    (value) => value.toFixed(2),
  );

  const draw = () => {
    const [t, s] = [temperature, surer].map((control) => Number(control.input.value));
    const right = success(p, s);
    const q = softmax(logits, t);
    chart.draw(p.flatMap((value, i) => [value, q[i] * right[i]]));
    const level = balance(logits, right);
    const where = level === null ? "no temperature between 0.2 and 20 holds it" : `it is held at T = ${level.toFixed(2)}`;
    output.textContent =
      `At T = ${t.toFixed(2)} entropy ${signed(drift(logits, t, right))} nats per unit step; ` +
      `if all draws were imitated, it ${signed(drift(logits, t, right.map(() => 1)))}. With the verdict ${where}.`;
  };
  for (const control of [temperature, surer]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, temperature.root, surer.root, output);
  draw();
}

export default { render };
