// One token of one response: how hard does each surrogate push its log-probability, and who falls silent when?
// The force is -dL/dlog p for an advantage of +1 or -1, times the response's token count for the sequence losses.

export const NAMES = ["PPO clip 0.2", "clip-higher 0.28", "dual clip 3", "CISPO, up to 6", "GPG", "SAPO", "GMPO 0.4", "GSPO 0.0004"];

/** Clipping that only ever removes a gain. */
function cut(ratio, sign, low, high) {
  return (sign > 0 && ratio > high) || (sign < 0 && ratio < low) ? 0 : sign * ratio;
}

/** Forces in the order of NAMES on a token of this ratio; the other tokens of its response all have the ratio `others`. */
export function forces(ratio, others, sign, tokens) {
  const mean = (own, rest) => Math.exp((own + (tokens - 1) * rest) / tokens);
  const gate = 1 / (1 + Math.exp(-(sign > 0 ? 1 : 1.05) * (ratio - 1)));
  const oneSided = (x) => (sign > 0 ? Math.min(x, 0.4) : Math.max(x, -0.4));
  const own = Math.log(ratio);
  return [
    cut(ratio, sign, 0.8, 1.2),
    cut(ratio, sign, 0.8, 1.28),
    sign < 0 && ratio > 3 ? 0 : cut(ratio, sign, 0.8, 1.2),
    sign * Math.min(ratio, 6),
    sign,
    sign * 4 * gate * (1 - gate) * ratio,
    oneSided(own) === own ? sign * mean(own, oneSided(Math.log(others))) : 0,
    cut(mean(own, Math.log(others)), sign, 1 - 3e-4, 1 + 4e-4),
  ];
}

function render({ model, el }) {
  const tokens = model.get("tokens");
  let sign = model.get("sign");
  const chart = barChart("Force on the token's log-probability (bar: size, up to 6)", NAMES.map((label) => ({ label })));
  const numbers = chart.root.querySelectorAll(".rlw-number");
  const output = liveOutput();
  const ratio = slider("ratio of this token", { min: 0.05, max: 7, step: 0.01, value: model.get("ratio") }, (v) => v.toFixed(2));
  const others = slider(
    `ratio of the ${tokens - 1} others`,
    { min: 0.995, max: 1.005, step: 0.0001, value: model.get("others") },
    (v) => v.toFixed(4),
  );
  const flip = element("button", { className: "rlw-button", type: "button", textContent: "change the sign of the advantage" });

  const draw = () => {
    const [r, q] = [ratio, others].map((control) => Number(control.input.value));
    const values = forces(r, q, sign, tokens);
    chart.draw(values.map((value) => Math.min(Math.abs(value) / 6, 1)));
    values.forEach((value, i) => (numbers[i].textContent = value.toFixed(2)));
    const silent = NAMES.filter((_, i) => values[i] === 0);
    output.textContent =
      `Advantage ${sign > 0 ? "+1" : "-1"}, ratio ${r.toFixed(2)}, others ${q.toFixed(4)}. ` +
      `Silent: ${silent.length ? silent.join("; ") : "none"}.`;
  };
  for (const control of [ratio, others]) control.input.addEventListener("input", draw);
  flip.addEventListener("click", () => {
    sign = -sign;
    draw();
  });

  el.classList.add("rlw");
  el.append(chart.root, ratio.root, others.root, element("div", { className: "rlw-row" }, flip), output);
  draw();
}

export default { render };
