// Attention rows around a learned target: which are left alone, and who owes a penalty that it cannot pay?

/** Largest entropy of every row i, in nats: log of the keys it may look at, or of the whole context for all of them. */
export function largest(length, context, causal) {
  return Array.from({ length }, (_, i) => Math.log(causal ? i + 1 : context));
}

/**
 * Shares of rows below, inside and above the dead zone; mean penalty; and the share of it that rows owe which would be
 * below even if they were flat. `heads`: entropies in nats, rows of a head in the order of their position.
 */
export function outcome(heads, theta, gamma, context, causal) {
  const count = [0, 0, 0];
  let total = 0;
  let helpless = 0;
  for (const rows of heads) {
    const most = largest(rows.length, context, causal);
    rows.forEach((entropyOfRow, i) => {
      const margin = gamma * most[i];
      const delta = entropyOfRow - theta * most[i];
      const outside = Math.abs(delta) > margin;
      count[outside ? (delta < 0 ? 0 : 2) : 1] += 1;
      const penalty = outside ? delta * delta : 0;
      total += penalty;
      if (Math.log(i + 1) < theta * most[i] - margin) helpless += penalty;
    });
  }
  const rows = count[0] + count[1] + count[2];
  return { shares: count.map((n) => n / rows), penalty: total / rows, helpless: total > 0 ? helpless / total : 0 };
}

function render({ model, el }) {
  const choices = model.get("models");
  const labels = ["too low", "in the dead zone", "too high"];
  const chart = barChart("Share of all attention rows", labels.map((label, i) => ({ label, hatched: i === 1 })));
  const output = liveOutput();
  const share = (v) => v.toFixed(2);
  const theta = slider("target theta", { min: 0, max: 1, step: 0.05, value: model.get("theta") }, share);
  const gamma = slider("tolerance gamma", { min: 0, max: 0.5, step: 0.05, value: model.get("gamma") }, share);
  const named = (v) => choices[v].name;
  const which = slider("network", { min: 0, max: choices.length - 1, step: 1, value: 0 }, named);
  const own = (v) => (v ? "what the row can reach" : "log of the context");
  const causal = slider("largest entropy", { min: 0, max: 1, step: 1, value: 0 }, own);

  const draw = () => {
    const [t, g, n, c] = [theta, gamma, which, causal].map((control) => Number(control.input.value));
    const found = outcome(choices[n].heads, t, g, model.get("context"), c === 1);
    chart.draw(found.shares);
    output.textContent =
      `${choices[n].name}, target ${share(t)} and tolerance ${share(g)}: mean penalty ${found.penalty.toFixed(3)}; ` +
      `${(100 * found.helpless).toFixed(0)} % of it is owed by rows with too few keys to reach the dead zone.`;
  };
  for (const control of [theta, gamma, which, causal]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, theta.root, gamma.root, which.root, causal.root, output);
  draw();
}

export default { render };
