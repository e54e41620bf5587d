// One training step of one GPU: which part of the memory grows with the model, which with the tokens of a pass, and
// what do more GPUs help? Weights, gradients and Adam's moments in float32, divided over the GPUs; passes in bfloat16.

const GIB = 2 ** 30;
const WIDE = 4; // bytes of a float32 number
const NARROW = 2; // of a bfloat16 number
const PLAIN_HEAD = 5; // arrays [tokens, V] around a softmax that keeps all logits
const KEPT = GIB; // logits that the tiled head keeps at most; it computes the others again
const TILE = 8192;

/** Bytes that autograd keeps of one layer, per token. */
export function layerBytes({ hidden, feedForward, heads, queryWidth, kvWidth }) {
  const norms = 2 * hidden * (WIDE + NARROW) + 2 * hidden * NARROW;
  const attention = NARROW * (2 * queryWidth + 2 * kvWidth) + WIDE * heads;
  return norms + attention + 4 * NARROW * feedForward;
}

/** Bytes of every part during the backward pass of one micro-batch of `tokens` tokens. */
export function parts(m, gpus, tokens, recompute, tiled) {
  const state = (m.parameters * WIDE) / gpus;
  const whole = (m.embedding + 2 * m.layer + Math.max(m.embedding, m.layer)) * NARROW;
  const layer = tokens * layerBytes(m);
  const inputs = tokens * m.hidden * NARROW;
  const last = tokens * m.hidden * (WIDE + 2 * NARROW);
  const backward = NARROW * (tokens * (3 * m.feedForward + 2 * m.hidden) + m.hidden * m.feedForward);
  const logits = tokens * m.vocabulary * WIDE;
  const tile = Math.min(TILE, tokens) * Math.min(TILE, m.vocabulary);
  const sums = Math.min(TILE, m.vocabulary) * m.hidden * WIDE;
  const matrices = tokens * m.hidden * (WIDE + NARROW) + m.vocabulary * m.hidden * NARROW + sums;
  const small = Math.min(logits, KEPT) + tile * (logits > KEPT ? WIDE + NARROW : NARROW) + matrices;
  const head = tiled ? small : PLAIN_HEAD * logits;
  return {
    weights: state,
    gradients: state,
    adam: 2 * state,
    gathered: gpus > 1 ? whole + m.layer * (WIDE + NARROW) : 0,
    activations: last + m.layers * (recompute ? inputs : layer),
    head: Math.max(head, recompute ? layer + backward : backward),
  };
}

export function total(bytes) {
  return Object.values(bytes).reduce((sum, value) => sum + value, 0);
}

const LABELS = ["float32 weights", "gradients", "Adam's two moments", "layers gathered", "activations", "head, or one layer's backward"];

function render({ model, el }) {
  const models = model.get("models");
  const rows = LABELS.map((label, i) => ({ label, hatched: i > 3 }));
  const chart = barChart("GiB of one GPU (full bar: 80)", rows);
  const output = liveOutput();
  const power = (value) => String(2 ** value);
  const choose = (words) => (value) => words[value];
  const size = slider(
    "model",
    { min: 0, max: models.length - 1, step: 1, value: model.get("chosen") },
    choose(models.map((m) => m.name)),
  );
  const gpus = slider("GPUs that share the state", { min: 0, max: 6, step: 1, value: 0 }, power);
  const tokens = slider("tokens in one pass", { min: 10, max: 16, step: 1, value: 12 }, power);
  const recompute = slider("activations", { min: 0, max: 1, step: 1, value: 0 }, choose(["kept", "recomputed"]));
  const tiled = slider("logits", { min: 0, max: 1, step: 1, value: 0 }, choose(["all kept", "in tiles"]));
  const controls = [size, gpus, tokens, recompute, tiled];

  const draw = () => {
    const [i, n, t, again, tiles] = controls.map((control) => Number(control.input.value));
    const bytes = parts(models[i], 2 ** n, 2 ** t, again === 1, tiles === 1);
    const gib = Object.values(bytes).map((value) => value / GIB);
    chart.draw(gib.map((value) => Math.min(value / 80, 1)));
    chart.root.querySelectorAll(".rlw-number").forEach((node, j) => (node.textContent = gib[j].toFixed(1)));
    const sum = total(bytes) / GIB;
    const card = [15, 22.5, 40, 80, 140].find((room) => sum <= 0.95 * room);
    const verdict = card ? `a GPU of ${card} GiB holds it` : "no GPU of up to 140 GiB holds it";
    const biggest = LABELS[gib.indexOf(Math.max(...gib))];
    output.textContent = `${models[i].name}: ${sum.toFixed(1)} GiB, most of it ${biggest}; ${verdict}.`;
  };
  for (const control of controls) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  el.append(chart.root, ...controls.map((control) => control.root), output);
  draw();
}

export default { render };
