// Figures of many layers or many models: heat maps, the map of models, marks by layer, residuals.

const SIGNS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "pentagon"];
const wheel = (c) => [c.heldout, c.insample, c.green, c.mean, c.orange, c.sky, c.ink];
const choiceOf = (name) => state.choice[name] || byId("choice-" + name).value;
const isShare = (quantity) => quantity !== "auto" && quantity !== "var90";
const names = () => DATA.layers.map((layer) => plain(layer.name));

// Names without the parts that all of them begin and end with.
function tellingParts(all) {
  let parts = all.map((name) => name.split("."));
  const same = (pick) => all.length > 1 && parts.every((part) => part.length > 1 && pick(part) === pick(parts[0]));
  while (same((part) => part[0])) parts = parts.map((part) => part.slice(1));
  while (same((part) => part.at(-1))) parts = parts.map((part) => part.slice(0, -1));
  return parts.map((part) => part.join("."));
}

// Beside the map, or above it where there is no room.
function colorbar(c, title, more = {}) {
  const above = { orientation: "h", x: 0.5, xanchor: "center", y: 1.02, yanchor: "bottom", len: 0.9 };
  return {
    thickness: 10, outlinewidth: 0, tickfont: { color: c.muted }, ...(NARROW.matches ? above : {}), ...more,
    title: { text: title, font: { size: 12, color: c.muted } },
  };
}

function heat(c, quantity, more) {
  const beyond = quantity === "beyond";
  const scale = beyond ? [[0, c.warm], [0.5, c.surface], [1, c.cold]] : [[0, c.low], [1, c.high]];
  return {
    type: "heatmap", colorscale: scale, xgap: 1, ygap: 1, hoverongaps: false,
    colorbar: colorbar(c, "", isShare(quantity) ? { tickformat: ".0%" } : { dtick: countStep(Math.max(...more.z.flat(), 1)) }),
    ...(beyond ? { zmid: 0 } : isShare(quantity) ? { zmin: 0 } : {}), ...more,
  };
}

const sizeOf = (count, most) => Math.max(Math.min(22, Math.floor(most / Math.max(count, 1))), 2);

figures.rolemap = (c) => {
  const { roles, depths, cells } = DATA.rolemap;
  const quantity = choiceOf("rolemap");
  const place = ["auto", "var90", "captured", "beyond"].indexOf(quantity) + 4;
  const z = roles.map(() => depths.map(() => null));
  const text = roles.map(() => depths.map(() => ""));
  for (const cell of cells) {
    z[cell[0]][cell[1]] = cell[place];
    const value = isShare(quantity) ? percent(cell[place]) : number(cell[place]);
    const what = cell[2] === 1 ? plain(DATA.layers[cell[3]].name) : `average of ${cell[2]} layers: ${plain(roles[cell[0]])}`;
    text[cell[0]][cell[1]] = `${what}<br>${plain(byId("choice-rolemap").selectedOptions[0].textContent)}: <b>${value}</b>`;
  }
  const label = depths.map((depth) => (depth === null ? "–" : String(depth)));
  const x = axis(c, DATA.figures.rolemap.x.label, { tickvals: label.map((_, at) => at), ticktext: label, showgrid: false, ticks: "", tickmode: depths.length > 40 ? "auto" : "array" });
  const y = axis(c, "", {
    tickvals: roles.map((_, at) => at), ticktext: tellingParts(roles).map((role) => plain(role, NARROW.matches ? 18 : 36)),
    autorange: "reversed", showgrid: false, ticks: "", showticklabels: roles.length <= 60,
  });
  const height = 120 + roles.length * sizeOf(roles.length, 900) * 1.3;
  return {
    data: [heat(c, quantity, { z, text, hovertemplate: "%{text}<extra></extra>" })],
    layout: layout(c, x, y, { hovermode: "closest", height: Math.max(220, Math.round(height)), plot_bgcolor: c.line }),
  };
};

// The middle of each role's run of layers, with the role; none where they are too many to read.
function roleMarks() {
  const roles = tellingParts(DATA.rolemap.roles);
  const places = roles.map((_, role) => DATA.layers.flatMap((layer, at) => (layer.role === role ? [at] : [])));
  return roles.length > 30 ? [] : roles.map((role, at) => [(places[at][0] + places[at].at(-1)) / 2, role]);
}

figures.layerranks = (c) => {
  const quantity = choiceOf("layerranks");
  const layers = DATA.heldout.layers;
  const ranks = [...new Set(layers.flatMap((layer) => layer.rank))].sort((one, two) => one - two);
  const value = (layer, rank) => {
    const at = layer.rank.indexOf(rank);
    if (at < 0) return null;
    const key = { captured: "heldout", in_sample: "in_sample", beyond: "heldout" }[quantity];
    const found = layer[key][at] ?? null;
    if (quantity !== "beyond" || found === null) return found;
    return layer.null[at] === null || layer.null[at] === undefined ? null : found - layer.null[at];
  };
  const z = layers.map((layer) => ranks.map((rank) => value(layer, rank)));
  const label = byId("choice-layerranks").selectedOptions[0].textContent;
  const text = z.map((row, at) => row.map((share, column) => `${plain(DATA.layers[at].name)}<br>rank ${ranks[column]}<br>${label}: <b>${percent(share)}</b>`));
  const few = layers.length <= 40;
  const x = axis(c, DATA.figures.layerranks.x.label, { tickvals: ranks.map((_, at) => at), ticktext: ranks.map(String), showgrid: false, ticks: "" });
  const marks = few ? tellingParts(DATA.layers.map((layer) => layer.name)).map((name, at) => [at, name]) : roleMarks();
  const y = axis(c, few ? "" : DATA.figures.layerranks.y.label, {
    autorange: "reversed", showgrid: false, ticks: "",
    tickvals: marks.map(([at]) => at), ticktext: marks.map(([, name]) => plain(name, NARROW.matches ? 16 : 36)),
  });
  const height = Math.max(220, Math.round(110 + layers.length * sizeOf(layers.length, 640)));
  return {
    data: [heat(c, quantity, { z, text, hovertemplate: "%{text}<extra></extra>", xgap: layers.length > 100 ? 0 : 1, ygap: layers.length > 100 ? 0 : 1 })],
    layout: layout(c, x, y, { hovermode: "closest", height, plot_bgcolor: c.line }),
  };
};

figures.similarity = (c) => {
  const found = DATA.similarity;
  const size = found.names.length;
  const packed = atob(found.cosines);
  const label = found.names.map((name) => plain(name));
  const [low, high] = found.range;
  const z = label.map((_, row) => Array.from({ length: size }, (_, column) =>
    (row === column ? 1 : low + (high - low) * packed.charCodeAt(row * size + column) / 255)));
  const text = label.map((row) => label.map((column) => row + "<br>" + column));
  const shapes = found.runs.map(([group, first, last]) => ({
    type: "rect", x0: first - 0.5, x1: last + 0.5, y0: first - 0.5, y1: last + 0.5, line: { color: c.ink, width: 1.5 },
    label: { text: last - first > size / 8 ? "group " + (group + 1) : "", textposition: "top left", font: { color: c.ink, size: 11 }, padding: 4 },
  }));
  const few = size <= 30;
  const ticks = few ? { tickvals: label.map((_, at) => at), ticktext: label.map((name) => (Array.from(name).length > 18 ? plain(found.names[label.indexOf(name)], 18) : name)) } : { showticklabels: false };
  const side = { showgrid: false, ticks: "", ...ticks };
  const data = [{
    type: "heatmap", z, text, zmin: low, zmax: high,
    colorscale: low < 0 ? [[0, c.warm], [0.5, c.surface], [1, c.cold]] : [[0, c.low], [1, c.high]],
    hovertemplate: "%{text}<br>cosine <b>%{z:.3~f}</b><extra></extra>",
    colorbar: colorbar(c, DATA.figures.similarity.value, { nticks: 6 }),
  }];
  const x = axis(c, few || NARROW.matches ? "" : DATA.figures.similarity.x.label, { ...side, constrain: "domain", tickangle: -60 });
  const y = axis(c, "", { ...side, autorange: "reversed", scaleanchor: "x", constrain: "domain", constraintoward: "top" });
  return { data, layout: layout(c, x, y, { hovermode: "closest", shapes, height: NARROW.matches ? 440 : 620 }) };
};

figures.map = (c) => {
  const { points, shares } = DATA.map;
  const [first, second] = choiceOf("map").split(",").map(Number);
  const colour = wheel(c);
  const groups = new Map();
  for (const point of points) {
    const key = point[1] === null ? "on its own" : "group " + (point[1] + 1);
    if (!groups.has(key)) groups.set(key, { place: point[1], points: [] });
    groups.get(key).points.push(point);
  }
  const ordered = [...groups].sort((one, two) => (one[1].place ?? 1e9) - (two[1].place ?? 1e9));
  const data = ordered.map(([key, group]) => ({
    type: "scatter", mode: "markers", name: key, showlegend: ordered.length <= 20,
    x: group.points.map((point) => point[2 + first]), y: group.points.map((point) => point[2 + second]),
    text: group.points.map((point) => plain(point[0])),
    marker: {
      size: 9, opacity: 0.85, line: { width: 1, color: c.surface },
      color: group.place === null ? c.null : colour[group.place % colour.length],
      symbol: group.place === null ? "circle-open" : SIGNS[(group.place + Math.floor(group.place / colour.length)) % SIGNS.length],
    },
    hovertemplate: "%{text}<br>%{x:.4~g}, %{y:.4~g}<extra>" + key + "</extra>",
  }));
  const title = (place) => `coefficient ${place + 1}` + (shares[place] === undefined ? "" : ` (${percent(shares[place])} of variance)`);
  const x = axis(c, title(first), { zeroline: true, zerolinecolor: c.line });
  const y = axis(c, title(second), { zeroline: true, zerolinecolor: c.line });
  return { data, layout: layout(c, x, y, { hovermode: "closest", height: NARROW.matches ? 420 : 520 }) };
};

// One mark per layer along the layers' order.
function byLayer(c, figure, series, yAxis, more = {}) {
  const label = names();
  const data = series.map((kind) => ({
    type: "scatter", mode: "markers", name: kind.name, x: label.map((_, at) => at + 1), y: kind.values, text: label,
    marker: { color: kind.color, symbol: kind.symbol === "x" ? "x-thin" : kind.symbol, size: 7, line: { width: 1.5, color: kind.color } },
    ...(kind.spread ? { error_y: { type: "data", array: kind.spread, color: faded(kind.color, 0.5), thickness: 1, width: 0 } } : {}),
    hovertemplate: `%{text}<br>${kind.name}: <b>%{y:.4~g}</b><extra></extra>`,
  }));
  const x = countAxis(c, figure.x.label, label.length, { range: [0.25, label.length + 0.75] });
  return { data, layout: layout(c, x, yAxis, { hovermode: "closest", ...more }) };
}

figures.secondary = (c) => {
  const figure = DATA.figures.secondary;
  const series = figure.marks.map((mark) => ({ ...lookOf(c, mark), values: DATA[mark.table].layers.map((found) => found[mark.column][0]) }));
  return byLayer(c, figure, series.filter((one) => has(one.values)), scaled(c, figure.y));
};

figures.suitability = (c) => {
  const limits = thresholdsNow();
  const found = suitability(DATA.suitability.exponents, limits);
  const pick = (retained) => found.layers.map((layer) => (layer && layer.retained === retained ? layer.mean : null));
  const spread = found.layers.map((layer) => (layer ? layer.spread : 0));
  const series = [
    { name: "retained", values: pick(true), spread, color: c.heldout, symbol: "circle" },
    { name: "left out", values: pick(false), spread, color: c.insample, symbol: "x" },
  ];
  const known = found.layers.flatMap((layer) => (layer ? [layer.mean - layer.spread, layer.mean + layer.spread] : []));
  const range = [Math.min(limits.low, ...known) - 0.5, Math.max(limits.high, ...known) + 0.5];
  const shapes = [{
    type: "rect", xref: "paper", x0: 0, x1: 1, y0: limits.low, y1: limits.high, layer: "below",
    fillcolor: faded(c.green, 0.14), line: { width: 0 },
  }];
  const { suitability: figure } = DATA.figures;
  return byLayer(c, figure, series.filter((one) => has(one.values)), axis(c, figure.y.label, { range }), { shapes });
};

figures.residuals = (c) => {
  const models = DATA.residual_names;
  const figure = DATA.figures.residuals;
  const few = models.length <= 40 && !NARROW.matches;
  const data = [{
    type: "bar", x: models.map((_, at) => at + 1), y: tableOf("residuals").residual, text: models.map((name) => plain(name)), textposition: "none",
    marker: { color: faded(c.insample, 0.75) }, hovertemplate: "%{text}<br>residual <b>%{y:.4~g}</b><extra></extra>",
  }];
  const ticks = few ? { tickmode: "array", tickvals: models.map((_, at) => at + 1), ticktext: models.map((name) => plain(name, 16)), tickangle: -60 } : {};
  const x = countAxis(c, few ? "" : figure.x.label, models.length, ticks);
  return { data, layout: layout(c, x, scaled(c, figure.y), { hovermode: "closest", bargap: models.length > 80 ? 0 : 0.35 }) };
};
