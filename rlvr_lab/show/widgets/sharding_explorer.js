// What one GPU holds of a model in training, and what it sends per optimizer step, when several share the work.
// Mixed precision: float32 weights (4 bytes a parameter), gradients (4) and Adam's two moments (8), bfloat16 passes (2).

export const SPLITS = ["data parallel", "FSDP2", "tensor parallel"];

/** Bytes per GPU: [weights, gradients, optimizer state, bfloat16 copy in use]. */
export function perGpu({ parameters, layers }, gpus, split) {
  if (SPLITS[split] === "data parallel") return [4 * parameters, 4 * parameters, 8 * parameters, 2 * parameters];
  const part = parameters / gpus;
  // FSDP2 brings one layer together at a time, and the next one while that is used; alone there is nothing to gather
  const copy = SPLITS[split] === "FSDP2" && gpus > 1 ? Math.min(parameters, (2 * parameters) / layers) : part;
  return [4 * part, 4 * part, 8 * part, 2 * copy];
}

/** Bytes that one GPU sends per optimizer step of `passes` micro-batches of `tokens` tokens (ring collectives). */
export function sent({ parameters, layers, hidden }, gpus, split, passes, tokens) {
  const ring = (gpus - 1) / gpus;
  if (SPLITS[split] === "data parallel") return 2 * ring * 4 * parameters; // one all-reduce of float32 gradients
  // weights for the forward and again for the backward pass in bfloat16; gradients reduced in float32 in every pass
  if (SPLITS[split] === "FSDP2") return passes * ring * (2 * 2 * parameters + 4 * parameters);
  return passes * layers * 4 * 2 * ring * 2 * tokens * hidden; // four all-reduces of activations per layer
}

const GIB = 2 ** 30;
const gib = (bytes) => (bytes / GIB).toFixed(bytes < 10 * GIB ? 1 : 0);

function render({ model, el }) {
  const shape = model.get("shape");
  const memory = model.get("memory") * GIB;
  const rows = ["weights", "gradients", "optimizer state", "copy in use", "all of it"];
  const chart = barChart(
    `${shape.name}: share of one GPU's ${model.get("memory")} GiB, without activations and sampler`,
    rows.map((label, i) => ({ label, hatched: i === 4 })),
  );
  const output = liveOutput();
  const power = Math.round(Math.log2(model.get("gpus")));
  const many = slider("GPUs", { min: 0, max: 6, step: 1, value: power }, (value) => String(2 ** value));
  const how = slider("split", { min: 0, max: 2, step: 1, value: model.get("split") }, (value) => SPLITS[value]);
  const draw = () => {
    const gpus = 2 ** Number(many.input.value);
    const split = Number(how.input.value);
    const parts = perGpu(shape, gpus, split);
    const all = parts.reduce((sum, part) => sum + part, 0);
    chart.draw([...parts, all].map((part) => Math.min(1, part / memory)));
    const traffic = sent(shape, gpus, split, model.get("passes"), model.get("tokens"));
    output.textContent =
      `${gpus} GPU${gpus > 1 ? "s" : ""}, ${SPLITS[split]}: ${gib(all)} GiB on each, ` +
      `which ${all <= memory ? "fits" : "does not fit"}; each sends ${gib(traffic)} GiB per optimizer step.`;
  };
  for (const [name, knob, value] of [
    ["gpus", many, (v) => 2 ** v],
    ["split", how, (v) => v],
  ]) {
    knob.input.addEventListener("input", () => {
      model.set(name, value(Number(knob.input.value)));
      model.save_changes();
      draw();
    });
  }
  el.classList.add("rlw");
  el.append(chart.root, many.root, how.root, output);
  draw();
}

export default { render };
