// One token under rewards that say nothing: where does the clip begin to act, and which way does it push on average?
// Nothing is sampled: the push is the expectation over the reward, in units of the positive advantage mass.

/** Probability after the token's logit has moved by `change`, all other logits fixed. */
export function moved(old, change) {
  const weight = old * Math.exp(change);
  return weight / (1 - old + weight);
}

/** Probabilities at which the ratio reaches 1 - range and 1 + range; the upper one can lie above 1. */
export function edges(old, range) {
  return [old * (1 - range), old * (1 + range)];
}

/** Expected coefficient of grad r: +1 below the range, -1 above it, 0 inside. */
export function push(ratio, range) {
  return ratio < 1 - range ? 1 : ratio > 1 + range ? -1 : 0;
}

const WORDS = { "-1": "down", 0: "none", 1: "up" };

function render({ model, el }) {
  const rows = ["lower edge", "old", "now", "upper edge (at most 1)"].map((label, i) => ({ label, hatched: i % 3 === 0 }));
  const chart = barChart("Probability of the token", rows);
  const output = liveOutput();
  const old = slider(
    "old probability",
    { min: 0.01, max: 0.99, step: 0.01, value: model.get("old") },
    (value) => value.toFixed(2),
  );
  const change = slider(
    "change of its logit",
    { min: -2, max: 2, step: 0.05, value: model.get("change") },
    (value) => value.toFixed(2),
  );
  const range = slider(
    "clip range",
    { min: 0.05, max: 0.5, step: 0.05, value: model.get("range") },
    (value) => value.toFixed(2),
  );

  const draw = () => {
    const [p, d, e] = [old, change, range].map((control) => Number(control.input.value));
    const now = moved(p, d);
    const [low, high] = edges(p, e);
    chart.draw([low, p, now, Math.min(high, 1)]);
    const rise = high >= 1 ? "it cannot leave the range upwards" : `it leaves the range after a rise of ${(high - p).toFixed(3)}`;
    output.textContent =
      `Old probability ${p.toFixed(2)}, now ${now.toFixed(3)}: ratio ${(now / p).toFixed(3)}, ` +
      `expected push ${WORDS[push(now / p, e)]}; ${rise}.`;
  };
  for (const control of [old, change, range]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, old.root, change.root, range.root, output);
  draw();
}

export default { render };
