// A rare token of a wrong response: does the filter keep it, and which is stronger, the push down or the pull back?
// Forces are on the token's log-probability, as in the loss of Lp-Reg with beta 1.

/** Filter of the old policy: the token's probability `old`, all others `rest` (shares of what it leaves). */
export function filtered(old, rest, kappa) {
  const p = [old, ...rest.map((share) => share * (1 - old))];
  const threshold = kappa * Math.max(...p);
  const mass = p.reduce((sum, value) => sum + (value >= threshold ? value : 0), 0);
  return { threshold, kept: old >= threshold, mass };
}

/** Push of GRPO with a lower clip of 0.8, push without it, and pull, where the token now has `ratio` times `old`. */
export function forces(ratio, mass, kept, size, limit = 10) {
  const d = -Math.log(mass * ratio);
  const held = kept && d > 0;
  const beyond = Math.exp(d) - d - 1 > limit;
  return { clipped: ratio < 0.8 ? 0 : size * ratio, push: size * ratio, pull: held && !beyond ? Math.expm1(d) : 0, beyond: held && beyond };
}

function render({ model, el }) {
  const labels = ["threshold of the filter", "old probability", "probability now"];
  const chart = barChart("One token of the fork", labels.map((label, i) => ({ label, hatched: i === 0 })));
  const output = liveOutput();
  const make = (name, low, high, step, value, format) => slider(name, { min: low, max: high, step, value }, format);
  const ratio = make("now, as a share of old", 0.04, 1, 0.01, model.get("ratio"), (v) => v.toFixed(2));
  const old = make("old probability", 0.002, 0.2, 0.002, model.get("old"), (v) => v.toFixed(3));
  const size = make("size of the negative advantage", 0.1, 2, 0.1, model.get("size"), (v) => v.toFixed(1));
  const kappa = make("threshold kappa", 0, 0.2, 0.01, model.get("kappa"), (v) => v.toFixed(2));

  const draw = () => {
    const [r, p, a, k] = [ratio, old, size, kappa].map((control) => Number(control.input.value));
    const { threshold, kept, mass } = filtered(p, model.get("rest"), k);
    const { clipped, push, pull, beyond } = forces(r, mass, kept, a);
    chart.draw([threshold, p, p * r]);
    const why = !kept ? "filtered as noise, so there is no pull" : beyond ? "kept, but the clamp has removed its pull" : "kept by the filter";
    const net = pull > push ? "up" : "down";
    output.textContent =
      `The token is ${why}. Push down ${push.toFixed(3)}, pull back ${pull.toFixed(3)}: it goes ${net}. ` +
      `GRPO with clip 0.2 would push ${clipped.toFixed(3)}.`;
  };
  for (const control of [ratio, old, size, kappa]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, ratio.root, old.root, size.root, kappa.root, output);
  draw();
}

export default { render };
