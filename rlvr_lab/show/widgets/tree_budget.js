// Trees of responses against independent ones: how many leaves for how many generated tokens, by a formula and as sampled?

/** Leaves of `trees` trees, each a root path with `branches` new endings at each of `forks` positions. */
export function leaves(trees, forks, branches) {
  return trees * (1 + forks * branches);
}

/** Generated tokens of a tree, divided by those of as many independent responses, where all paths are equally long and
    the forks lie at the share `position` of the path: (1 + BN (1 - position)) / (1 + BN). */
export function ratio(forks, branches, position) {
  const ends = forks * branches;
  return (1 + ends * (1 - position)) / (1 + ends);
}

/** What a recorded rollout says of the same shape. Roots: length, and forks in the order in which they were chosen, each
    with its position and the tokens that every branch generated. */
export function measured(roots, trees, forks, branches) {
  const used = roots.slice(0, trees);
  const mean = roots.reduce((sum, root) => sum + root.length, 0) / roots.length;
  const chosen = used.flatMap((root) => root.forks.slice(0, forks).map((fork) => ({ ...fork, share: fork.position / root.length })));
  const ends = chosen.flatMap((fork) => fork.branches.slice(0, branches));
  const tokens = used.reduce((sum, root) => sum + root.length, 0) + ends.reduce((sum, n) => sum + n, 0);
  const paths = used.length + ends.length;
  return {
    paths,
    tokens,
    plain: paths * mean,
    ratio: tokens / (paths * mean),
    position: chosen.length ? chosen.reduce((sum, fork) => sum + fork.share, 0) / chosen.length : null,
  };
}

function render({ model, el }) {
  const roots = model.get("roots");
  const most = (values) => Math.max(...values);
  const mean = roots.reduce((sum, root) => sum + root.length, 0) / roots.length;
  const count = (name, max, key) => slider(name, { min: 1, max, step: 1, value: model.get(key) }, (v) => v.toFixed(0));
  const trees = count("trees", roots.length, "trees");
  const forks = count("forks of each tree", most(roots.map((root) => root.forks.length)), "forks");
  const branches = count("branches at each fork", most(roots.flatMap((root) => root.forks.map((f) => f.branches.length))), "branches");
  const position = slider(
    "position of the forks",
    { min: 0, max: 1, step: 0.05, value: model.get("position") },
    (v) => `${(100 * v).toFixed(0)} %`,
  );
  const chart = barChart("Generated tokens, as a share of plain sampling of as many responses", [
    { label: "plain sampling" },
    { label: "tree, by the formula", hatched: true },
    { label: "tree, as recorded" },
  ]);
  const output = liveOutput();

  const draw = () => {
    const [m, n, b, f] = [trees, forks, branches, position].map((control) => Number(control.input.value));
    const paths = leaves(m, n, b);
    const by = ratio(n, b, f);
    const real = measured(roots, m, n, b);
    chart.draw([1, by, real.ratio]);
    output.textContent =
      `${paths} leaves. With forks at ${(100 * f).toFixed(0)} % of a path the formula says ${by.toFixed(3)}: ` +
      `${(by * paths * mean).toFixed(0)} tokens, where ${paths} independent responses take ${(paths * mean).toFixed(0)}. ` +
      `The recorded trees forked at ${(100 * real.position).toFixed(0)} % on average and took ${real.tokens} tokens for ` +
      `${real.paths} leaves, ${real.ratio.toFixed(3)} of plain sampling. For the same tokens plain sampling gives ` +
      `${(real.tokens / mean).toFixed(1)} responses.`;
  };
  for (const control of [trees, forks, branches, position]) control.input.addEventListener("input", draw);

  el.classList.add("rlw");
  // first what can always move: a recorded tree may have one fork, and begin with all of its roots
  el.append(chart.root, position.root, trees.root, forks.root, branches.root, output);
  draw();
}

export default { render };
