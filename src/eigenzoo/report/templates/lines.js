// Figures of curves: spectra, what is kept by rank, growth, halves, function.

const SHARE = "share of variance";

figures.scree = (c) => {
  const found = perLayer(DATA.spectra);
  if (!found.rank.length) return nothing(c, "This layer has no variance, so it has no spectrum.");
  const kind = kinds(c);
  const data = [];
  if (has(found.layers_low)) data.push(...band("eight of ten layers", c.orange, found.rank, found.layers_low, found.layers_high));
  if (has(found.low)) data.push(...band("unrelated, 90 % of draws", c.null, found.rank, found.low, found.high));
  for (const name of ["norm_matched", "iid", "permuted", "spectrum_matched"]) {
    if (has(found[name])) data.push(line(kind[name], found.rank, found[name], { mode: "lines" }));
  }
  data.push(line(kind.all_models, found.rank, found.spectrum));
  const y = logShareAxis(c, SHARE, [found.spectrum, found.low || [], found.high || [], found.layers_low || [], found.layers_high || []]);
  return { data, layout: layout(c, rankAxis(c, found.rank.at(-1), "direction"), y) };
};

figures.cumulative = (c) => {
  const found = perLayer(DATA.spectra);
  if (!found.rank.length) return nothing(c, "This layer has no variance, so it has no spectrum.");
  const kind = kinds(c);
  const data = [];
  for (const name of ["norm_matched", "iid", "permuted", "spectrum_matched"]) {
    if (has(found[name + "_sum"])) data.push(line(kind[name], found.rank, found[name + "_sum"], { mode: "lines" }));
  }
  data.push(line(kind.all_models, found.rank, found.spectrum_sum));
  const held = DATA.heldout && perLayer(DATA.heldout);
  if (held && has(held.heldout)) data.push(line(kind.heldout, held.rank, held.heldout));
  return { data, layout: layout(c, rankAxis(c, found.rank.at(-1)), axis(c, SHARE, { tickformat: ".0%", rangemode: "tozero" })) };
};

figures.axes = (c) => {
  const layer = state.layer < 0 ? DATA.axes.layers.findIndex((sides) => Object.keys(sides).length) : state.layer;
  const sides = DATA.axes.layers[layer] || {};
  const colour = { outputs: c.heldout, inputs: c.insample };
  const data = [];
  for (const [side, found] of Object.entries(sides)) {
    if (!has(found.spectrum)) continue;
    const kind = { name: side, color: colour[side] || c.green, dash: "solid", symbol: side === "inputs" ? "square" : "circle", width: 2 };
    data.push(line(kind, found.rank, found.spectrum));
    if (has(found.null)) data.push(line({ ...kind, name: side + ", chance", dash: "dot", width: 1.5 }, found.rank, found.null, { mode: "lines" }));
  }
  if (!data.length) return nothing(c);
  const note = state.layer < 0 ? [{ text: plain(DATA.layers[layer].name), showarrow: false, x: 1, y: 1, xref: "paper", yref: "paper", font: { color: c.muted } }] : [];
  const y = logShareAxis(c, "share of energy", data.map((trace) => trace.y));
  return { data, layout: layout(c, rankAxis(c, 4096, "direction", { autorange: true }), y, { annotations: note }) };
};

figures.heldout = (c) => {
  const found = perLayer(DATA.heldout);
  if (!has(found.heldout) && !has(found.in_sample)) return nothing(c);
  const kind = kinds(c);
  const data = [];
  if (has(found.null)) data.push(line(kind.null, found.rank, found.null));
  if (has(found.in_sample)) data.push(line(kind.in_sample, found.rank, found.in_sample));
  if (has(found.leave_one_out.heldout)) data.push(line(kind.leave_one_out, found.leave_one_out.rank, found.leave_one_out.heldout));
  if (has(found.heldout)) data.push(line(kind.heldout, found.rank, found.heldout));
  const most = Math.max(...found.rank, ...(found.leave_one_out.rank || []));
  return { data, layout: layout(c, rankAxis(c, most), axis(c, SHARE, { tickformat: ".0%", rangemode: "tozero" })) };
};

figures.mean = (c) => {
  const values = perLayer(DATA.mean);
  if (!has(values)) return nothing(c);
  const names = ["in-sample", "held out", "by chance"];
  const shown = [0, 1, 2].filter((place) => values[place] !== null);
  const fill = [c.insample, c.mean, c.null];
  const pattern = ["/", "", "."];
  const data = [{
    type: "bar", x: shown.map((place) => names[place]), y: shown.map((place) => values[place]),
    marker: {
      color: shown.map((place) => fill[place]),
      pattern: { shape: shown.map((place) => pattern[place]), bgcolor: c.surface, fgcolor: shown.map((place) => fill[place]), size: 6 },
      line: { color: shown.map((place) => fill[place]), width: 1.5 },
    },
    text: shown.map((place) => percent(values[place])), textposition: "outside", cliponaxis: false, width: 0.5,
    textfont: { color: c.ink }, hovertemplate: "%{x}: %{y:.4~g} of energy<extra></extra>",
  }];
  const least = Math.min(0, ...values.filter((value) => value !== null));
  const low = least < 0 ? 1.15 * least - 0.1 : 0; // room for the number below the bar
  const y = axis(c, "share of energy", { tickformat: ".0%", range: [low, 1.12], zeroline: true, zerolinecolor: c.muted });
  return { data, layout: layout(c, axis(c, "", { showgrid: false }), y, { showlegend: false, hovermode: "closest" }) };
};

figures.growthrank = (c) => {
  const found = DATA.growth;
  const kind = kinds(c);
  const most_models = Math.max(...found.num_models);
  const most = { name: "most possible, N − 1", color: c.null, dash: "dot", symbol: "x", width: 1.5 };
  const data = [
    line(most, found.num_models, found.num_models.map((count) => count - 1), { mode: "lines" }),
    line({ ...kind.in_sample, name: "for 90 % of variance, in-sample" }, found.num_models, found.var90_rank),
  ];
  return { data, layout: layout(c, countAxis(c, "models fitted", most_models), countAxis(c, "directions", most_models, { rangemode: "tozero", showgrid: true })) };
};

figures.growthcaptured = (c) => {
  const found = DATA.growth;
  const kind = kinds(c);
  const data = [];
  if (has(found.null)) data.push(line(kind.null, found.num_models, found.null));
  if (has(found.in_sample)) data.push(line(kind.in_sample, found.num_models, found.in_sample));
  const spread = has(found.spread) ? { error_y: { type: "data", array: found.spread, color: c.heldout, thickness: 1.2, width: 4 } } : {};
  data.push(line(kind.heldout, found.num_models, found.captured, spread));
  const y = axis(c, SHARE, { tickformat: ".0%", rangemode: "tozero" });
  return { data, layout: layout(c, countAxis(c, "models fitted", Math.max(...found.num_models)), y) };
};

figures.halves = (c) => {
  const found = perLayer(DATA.halves);
  if (!has(found.cosine)) return nothing(c);
  const kind = kinds(c);
  const data = [];
  if (has(found.low)) data.push(...band("90 % of splits", c.heldout, found.rank, found.low, found.high));
  if (has(found.null_high)) data.push(...band("unrelated, to 95 % of draws", c.null, found.rank, found.null, found.null_high));
  if (has(found.null)) data.push(line({ ...kind.null, name: "unrelated subspaces" }, found.rank, found.null));
  data.push(line({ ...kind.heldout, name: "two halves" }, found.rank, found.cosine));
  const x = countAxis(c, "principal angle, closest first", found.rank.at(-1));
  return { data, layout: layout(c, x, axis(c, "cosine", { range: [0, 1.04] })) };
};

figures.function = (c) => {
  const { mean, spread } = DATA.function;
  const kind = kinds(c);
  const curve = (name, of, label) => {
    const error = spread[name].map(([, value]) => value || 0);
    const more = { error_y: { type: "data", array: error, color: of.color, thickness: 1.2, width: 4 } };
    return line({ ...of, name: label }, mean[name].map(([rank]) => rank), mean[name].map(([, value]) => value), more);
  };
  const data = [];
  const largest = Math.max(...mean.rebuilt.map(([rank]) => rank), ...mean.random_basis.map(([rank]) => rank));
  const controls = [["original", "originals", c.ink, "solid"], ["parent", "parent", c.green, "dash"], ["mean", "mean alone", c.mean, "dashdot"],
    ["head_only", "mean with own heads", c.orange, "longdash"], ["secondary", "secondary directions", c.sky, "dot"]];
  for (const [name, label, colour, dash] of controls) {
    if (mean[name] === null) continue;
    data.push({ type: "scatter", mode: "lines", x: [1, largest], y: [mean[name], mean[name]], name: label, line: { color: colour, dash, width: 1.5 }, hovertemplate: "%{y:.4~g}" });
  }
  if (mean.random_basis.length) data.push(curve("random_basis", kind.null, "random basis"));
  data.push(curve("rebuilt", kind.heldout, "rebuilt"));
  return { data, layout: layout(c, rankAxis(c, largest), axis(c, plain(DATA.function.metric))) };
};
