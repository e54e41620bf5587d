// The next-token distribution at two positions of one response, under a common sampling temperature.

function render({ model, el }) {
  const positions = ["fork", "computed"].map((kind) => ({
    kind,
    logits: model.get(`${kind}_logits`),
    chart: barChart(
      `Next token at a ${kind} position`,
      model.get(`${kind}_labels`).map((label) => ({ label })),
    ),
  }));
  const output = liveOutput();
  const knob = slider(
    "temperature",
    { min: 0.1, max: 3, step: 0.1, value: model.get("temperature") },
    (value) => value.toFixed(1),
  );

  const draw = () => {
    const temperature = Number(knob.input.value);
    const parts = positions.map(({ kind, logits, chart }) => {
      const p = softmax(logits, temperature);
      chart.draw(p);
      return `${kind} token ${entropy(p).toFixed(3)} nats`;
    });
    output.textContent = `At temperature ${temperature.toFixed(1)}: entropy of the ${parts.join(", of the ")}.`;
  };
  knob.input.addEventListener("input", () => {
    model.set("temperature", Number(knob.input.value));
    model.save_changes();
    draw();
  });
  // Another widget, or Python, may move the temperature too.
  model.on("change:temperature", () => {
    knob.input.value = model.get("temperature");
    knob.update();
    draw();
  });

  el.classList.add("rlw");
  el.append(element("div", { className: "rlw-pair" }, ...positions.map(({ chart }) => chart.root)), knob.root, output);
  draw();
}

export default { render };
