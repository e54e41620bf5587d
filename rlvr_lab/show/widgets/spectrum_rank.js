// One spectrum, three counts of its directions: what does each say, and which of them sees the mean?

/** lambda_i = i^-decay for i = 1..width, the first one `massive` times as large. */
export function powerLaw(width, decay, massive = 1) {
  return Array.from({ length: width }, (_, i) => (i + 1) ** -decay * (i === 0 ? massive : 1));
}

/** exp of the entropy of the values as shares; of eigenvalues or of singular values, which is the whole dispute. */
export function rankMe(values) {
  const total = values.reduce((sum, value) => sum + value, 0);
  return Math.exp(entropy(values.map((value) => value / total)));
}

/** (sum)^2 / sum of squares. */
export function participation(values) {
  const total = values.reduce((sum, value) => sum + value, 0);
  return total ** 2 / values.reduce((sum, value) => sum + value ** 2, 0);
}

/** Singular values of states whose mean, squared, is `offset` times their variance and lies in no direction of theirs. */
export function uncentred(eigenvalues, offset) {
  const total = eigenvalues.reduce((sum, value) => sum + value, 0);
  return [...eigenvalues, offset * total].map(Math.sqrt);
}

const SHOWN = 12;

function render({ model, el }) {
  const width = model.get("width");
  const labels = Array.from({ length: SHOWN }, (_, i) => ({ label: `λ ${i + 1}` }));
  const chart = barChart(`Share of the variance, first ${SHOWN} of ${width} directions`, labels);
  const output = liveOutput();
  const two = (value) => value.toFixed(2);
  const decay = slider("decay α", { min: 0, max: 4, step: 0.1, value: model.get("decay") }, two);
  const massive = slider("first direction, times", { min: 1, max: 200, step: 1, value: model.get("massive") }, String);
  const offset = slider("squared mean / variance", { min: 0, max: 50, step: 0.5, value: model.get("offset") }, two);

  const draw = () => {
    const eigen = powerLaw(width, Number(decay.input.value), Number(massive.input.value));
    const total = eigen.reduce((sum, value) => sum + value, 0);
    chart.draw(eigen.slice(0, SHOWN).map((value) => value / total));
    const raw = rankMe(uncentred(eigen, Number(offset.input.value)));
    output.textContent =
      `RankMe from eigenvalues ${rankMe(eigen).toFixed(1)} (spectral entropy ${Math.log(rankMe(eigen)).toFixed(3)} nats), ` +
      `from singular values ${rankMe(eigen.map(Math.sqrt)).toFixed(1)}, without centring ${raw.toFixed(1)}; ` +
      `participation ratio ${participation(eigen).toFixed(1)}.`;
  };
  for (const [name, control] of Object.entries({ decay, massive, offset })) {
    control.input.addEventListener("input", () => {
      model.set(name, Number(control.input.value));
      model.save_changes();
      draw();
    });
  }

  el.classList.add("rlw");
  el.append(decay.root, massive.root, offset.root, chart.root, output);
  draw();
}

export default { render };
