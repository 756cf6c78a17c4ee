// Figures of curves, drawn from their description: axes, and marks that name a column of a table each.

// A table of the chosen layer, or of all; of the first layer that has it, where there is no average.
function tableOf(name) {
  const { all, layers } = DATA[name];
  if (!layers.length || (state.layer < 0 && Object.keys(all).length)) return all;
  return (state.layer < 0 ? layers.find((found) => Object.keys(found).length) : layers[state.layer]) || {};
}

// Colour, dash and sign of a mark, with its own name; the metric's name may be in it.
const lookOf = (c, mark) => ({ ...kinds(c)[mark.look], name: plain(mark.label) });

function traces(c, figure) {
  const data = [];
  const levels = [];
  for (const mark of figure.marks) {
    const found = tableOf(mark.table);
    const [x] = Object.values(found);
    const look = lookOf(c, mark);
    const y = found[mark.column];
    if (!has(y) || mark.kind === "upright") continue;
    if (mark.kind === "band") data.push(...band(look.name, look.color, x, found[mark.low], y));
    else if (mark.kind === "level") levels.push({ ...line(look, [1], y), mode: "lines" });
    else {
      const error = mark.error && has(found[mark.error]) ? { error_y: { type: "data", array: found[mark.error], color: look.color, thickness: 1.2, width: 4 } } : {};
      data.push(line(look, x, y, { ...(mark.kind === "curve" || !look.symbol ? { mode: "lines" } : {}), ...error }));
    }
  }
  const largest = Math.max(1, ...data.flatMap((trace) => trace.x));
  return [...levels.map((level) => ({ ...level, x: [1, largest], y: [level.y[0], level.y[0]] })), ...data];
}

// An axis of a scale; see `figures.Axis`.
function scaled(c, { label, scale }, data = [], horizontal = false) {
  const largest = Math.max(1, ...data.flatMap((trace) => (horizontal ? trace.x : trace.y)));
  if (scale === "rank") return rankAxis(c, largest, label);
  if (scale === "count") return countAxis(c, label, largest, horizontal ? {} : { rangemode: "tozero", showgrid: true });
  if (scale === "bytes") return bytesAxis(c, label, data.flatMap((trace) => trace.x));
  if (scale === "log share") return logShareAxis(c, label, data.map((trace) => trace.y));
  return axis(c, label, { share: { tickformat: ".2~%", rangemode: "tozero" }, cosine: { range: [0, 1.04] } }[scale]);
}

for (const [name, figure] of Object.entries(DATA.figures)) {
  figures[name] = (c) => {
    const data = traces(c, figure);
    if (!data.length) return nothing(c, name === "scree" || name === "cumulative" ? "This layer has no variance, so it has no spectrum." : undefined);
    const own = DATA[figure.marks[0].table];
    const first = figure.by_layer && state.layer < 0 && !Object.keys(own.all).length && own.layers.findIndex((found) => Object.keys(found).length);
    const note = { text: first === false ? "" : plain(DATA.layers[first].name), showarrow: false, x: 1, y: 1, xref: "paper", yref: "paper", font: { color: c.muted } };
    return { data, layout: layout(c, scaled(c, figure.x, data, true), scaled(c, figure.y, data), { annotations: first === false ? [] : [note] }) };
  };
}

figures.mean = (c) => {
  const { marks, x, y: share } = DATA.figures.mean;
  const valueOf = (mark) => (tableOf(mark.table)[mark.column] || [null])[0];
  const shown = marks.filter((mark) => valueOf(mark) !== null);
  if (!shown.length) return nothing(c);
  const values = shown.map(valueOf);
  const fill = shown.map((mark) => lookOf(c, mark).color);
  const data = [{
    type: "bar", x: shown.map((mark) => mark.label), y: values,
    marker: {
      color: fill, line: { color: fill, width: 1.5 },
      pattern: { shape: shown.map((mark) => ({ in_sample: "/", null: "." })[mark.look] || ""), bgcolor: c.surface, fgcolor: fill, size: 6 },
    },
    text: values.map(percent), textposition: "outside", cliponaxis: false, width: 0.5,
    textfont: { color: c.ink }, hovertemplate: "%{x}: %{y:.4~g} of energy<extra></extra>",
  }];
  const least = Math.min(0, ...values);
  const low = least < 0 ? 1.15 * least - 0.1 : 0; // room for the number below the bar
  const y = axis(c, share.label, { tickformat: ".0%", range: [low, 1.12], zeroline: true, zerolinecolor: c.muted });
  return { data, layout: layout(c, axis(c, x.label, { showgrid: false }), y, { showlegend: false, hovermode: "closest" }) };
};
