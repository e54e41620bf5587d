// Two matrices compete for one place among those that train: which one has the lower condition number, as it is and for
// its shape?

/** Index of the lowest, as ranked by kappa, and by kappa over what is usual for a random matrix of the shape. */
export function ranked(kappas, chance) {
  const lowest = (values) => values.indexOf(Math.min(...values));
  const matched = kappas.map((kappa, i) => kappa / chance[i]);
  return { matched, plain: lowest(kappas), fair: lowest(matched) };
}

/** Three digits, without an exponent. */
export function digits(value) {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

function render({ model, el }) {
  const shapes = model.get("shapes");
  const chart = barChart("Kappa, on a logarithmic scale from 1 to 10,000 (numbers are shares of it)", [
    { label: "long matrix" },
    { label: "random, its shape", hatched: true },
    { label: "square matrix" },
    { label: "random, its shape", hatched: true },
  ]);
  const output = liveOutput();
  const power = (v) => digits(10 ** v);
  const last = shapes.length - 1;
  const shape = slider("shape of the long matrix", { min: 1, max: last, step: 1, value: model.get("shape") }, (v) => shapes[v].name);
  const long = slider("its kappa", { min: 0, max: 4, step: 0.05, value: Math.log10(model.get("long")) }, power);
  const square = slider("kappa of the square one", { min: 0, max: 4, step: 0.05, value: Math.log10(model.get("square")) }, power);

  const draw = () => {
    const [s, l, q] = [shape, long, square].map((control) => Number(control.input.value));
    const chance = [shapes[s].chance, shapes[0].chance];
    const { matched, plain, fair } = ranked([10 ** l, 10 ** q], chance);
    chart.draw([l, Math.log10(chance[0]), q, Math.log10(chance[1])].map((v) => Math.min(v / 4, 1)));
    const names = [shapes[s].name, shapes[0].name];
    output.textContent =
      `The ${names[0]} matrix has ${digits(matched[0])} times the kappa that is usual for its shape, the ${names[1]} one ` +
      `${digits(matched[1])} times. Ranked by kappa the ${names[plain]} matrix trains; ranked for its shape, the ` +
      `${names[fair]} one.`;
  };
  for (const control of [shape, long, square]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, shape.root, long.root, square.root, output);
  draw();
}

export default { render };
