// A corridor around the mean entropy of earlier steps: which tokens lie outside, and which way are they pushed?

/** Edges of the corridor in nats, and whether the upper one lies above the largest entropy, ln V. */
export function corridor(history, low, high, most) {
  return { lower: low * history, upper: high * history, vacuous: high * history >= most };
}

/** Push on a token's entropy in units of lambda: 1 inside (the bonus), with the penalty's weight outside. */
export function push(entropyOfToken, history, low, high, weight) {
  const below = entropyOfToken < low * history;
  const above = entropyOfToken > high * history;
  return 1 + (below ? weight : 0) - (above ? weight : 0);
}

/** Shares of tokens below, inside and above. */
export function shares(entropies, history, low, high) {
  const below = entropies.filter((h) => h < low * history).length;
  const above = entropies.filter((h) => h > high * history).length;
  return [below, entropies.length - below - above, above].map((count) => count / entropies.length);
}

function render({ model, el }) {
  const entropies = model.get("entropies");
  const mean = entropies.reduce((sum, h) => sum + h, 0) / entropies.length;
  const labels = ["below the corridor", "inside", "above the corridor"];
  const chart = barChart("Share of all tokens", labels.map((label, i) => ({ label, hatched: i === 1 })));
  const output = liveOutput();
  const make = (name, low, high, step, value, format) => slider(name, { min: low, max: high, step, value }, format);
  const low = make("lower edge, times the history", 0, 1, 0.05, model.get("low"), (v) => v.toFixed(2));
  const high = make("upper edge, times the history", 1, 30, 0.1, model.get("high"), (v) => v.toFixed(1));
  const weight = make("weight of the penalty, beta alpha", 0, 10, 0.1, model.get("weight"), (v) => v.toFixed(1));
  const history = make("history, times the present mean", 0.5, 3, 0.1, 1, (v) => v.toFixed(1));

  const draw = () => {
    const [kl, kh, w, times] = [low, high, weight, history].map((control) => Number(control.input.value));
    const past = times * mean;
    chart.draw(shares(entropies, past, kl, kh));
    const { lower, upper, vacuous } = corridor(past, kl, kh, model.get("most"));
    const out = (h) => push(h, past, kl, kh, w).toFixed(1);
    output.textContent =
      `The corridor runs from ${lower.toFixed(3)} to ${upper.toFixed(3)} nats` +
      `${vacuous ? ", so high that no token can be above it" : ""}. In units of lambda a token of 0 nats ` +
      `gets ${out(0)}, one of 1 nat ${out(1)}.`;
  };
  for (const control of [low, high, weight, history]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, low.root, high.root, weight.root, history.root, output);
  draw();
}

export default { render };
