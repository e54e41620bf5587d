// HAPO on one token: what does its entropy do to temperature, clip bounds and advantage, in the text and in the release?

/** The scaled log-entropy; `released` divides by the negative minimum, so that nothing is below 0. */
export function signal(entropy, { pivot, highest, lowest }, released) {
  const distance = Math.log(Math.max(entropy, 1e-8)) - pivot;
  return distance > 0 ? distance / highest : distance / (released ? lowest : -lowest);
}

/** Temperature, both bounds of the ratio, and the factor of the advantage. */
export function treatment(h, ratio, { low, high, tau }) {
  const inside = ratio >= 1 - low / 2 && ratio <= 1 + high / 2;
  return {
    temperature: 1 + tau * Math.min(Math.max(h, -1), 1),
    lower: 1 - (h <= 0 ? low * (1 - h) : low),
    upper: 1 + (h > 0 ? high * (1 + h) : high),
    factor: (h > 0 ? !inside : inside) ? 1 + h : 1,
  };
}

function render({ model, el }) {
  const [scale, settings] = [model.get("scale"), model.get("settings")];
  const forms = ["signed", "released"];
  const chart = barChart(
    "Room of the importance ratio",
    ["below 1", "above 1"].flatMap((side) => forms.map((form, i) => ({ label: `${side}, ${form}`, hatched: i === 1 }))),
  );
  const output = liveOutput();
  const entropy = slider(
    "token entropy (power of ten)",
    { min: -8, max: Math.log10(model.get("most")).toFixed(2), step: 0.1, value: model.get("entropy") },
    (power) => `${(10 ** power).toPrecision(2)} nats`,
  );
  const ratio = slider("importance ratio", { min: 0.5, max: 1.6, step: 0.01, value: model.get("ratio") }, (v) => v.toFixed(2));

  const draw = () => {
    const signals = forms.map((form) => signal(10 ** Number(entropy.input.value), scale, form === "released"));
    const found = signals.map((h) => treatment(h, Number(ratio.input.value), settings));
    chart.draw([...found.map((one) => 1 - one.lower), ...found.map((one) => one.upper - 1)]);
    output.textContent = found
      .map(
        (one, i) =>
          `${forms[i]}: signal ${signals[i].toFixed(2)}, temperature ${one.temperature.toFixed(3)}, ` +
          `advantage times ${one.factor.toFixed(2)}`,
      )
      .join("; ");
  };
  for (const control of [entropy, ratio]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, entropy.root, ratio.root, output);
  draw();
}

export default { render };
