// Size against error: two sliders, one readout, and the curve.

const sizeNow = { by: "by_rank", place: 0 };

function sizeRow() {
  const rows = DATA.sizes[sizeNow.by];
  return Object.fromEntries(Object.keys(rows).map((key) => [key, rows[key][sizeNow.place]]));
}

figures.sizes = (c) => {
  const rows = DATA.sizes.by_rank;
  const kind = kinds(c);
  const data = traces(c, DATA.figures.sizes).map((trace) => ({
    ...trace, text: rows.at.map((rank) => "rank " + rank), hovertemplate: "%{text}, %{x:.4~s}B: %{y:.4~g} lost<extra>" + trace.name + "</extra>",
  }));
  const now = sizeRow();
  for (const [key, of] of [["in_sample", kind.all_models], ["heldout", kind.heldout]]) {
    if (now[key] === null) continue;
    data.push({
      type: "scatter", mode: "markers", x: [now.bytes], y: [1 - now[key]], name: "chosen, " + of.name, showlegend: false,
      marker: { color: of.color, symbol: of.symbol, size: 13, line: { color: c.ink, width: 1.5 } },
      hovertemplate: "chosen: %{x:.4~s}B, %{y:.4~g} lost<extra>" + of.name + "</extra>",
    });
  }
  const more = { hovermode: "closest" };
  const known = metricPoints();
  if (known) {
    data.push(line({ name: plain(DATA.sizes.function.metric, 28) + ", rebuilt", color: c.green, dash: "dashdot", symbol: "diamond", width: 2 },
      known.map((point) => point.bytes), known.map((point) => point.value),
      { yaxis: "y2", text: known.map((point) => "rank " + point.rank), hovertemplate: "%{text}: %{y:.4~g}<extra>metric</extra>" }));
    more.yaxis2 = axis(c, DATA.sizes.function.metric, { overlaying: "y", side: "right", showgrid: false, tickmode: "auto", nticks: 6 });
  }
  const zoo = DATA.sizes.whole_zoo;
  if (zoo > 0) {
    more.shapes = [{ type: "line", yref: "paper", x0: zoo, x1: zoo, y0: 0, y1: 1, line: { color: c.muted, width: 1.5, dash: "dot" } }];
    more.annotations = [{
      x: Math.log10(zoo), y: 1, yref: "paper", text: DATA.figures.sizes.marks.at(-1).label, showarrow: false, xanchor: "right", yanchor: "top", xshift: -4,
      font: { color: c.muted, size: 12 },
    }];
  }
  const x = bytesAxis(c, DATA.figures.sizes.x.label, [zoo, ...rows.bytes]);
  return { data, layout: layout(c, x, scaled(c, DATA.figures.sizes.y), more) };
};

// The metric at the ranks it was measured at, with their bytes.
function metricPoints() {
  const measured = DATA.sizes.function;
  if (!measured) return null;
  const rows = DATA.sizes.by_rank;
  const points = measured.rebuilt.filter(([rank]) => rank < rows.at.length).map(([rank, value]) => ({ rank, value, bytes: rows.bytes[rank] }));
  return points.length ? points : null;
}

function metricText(now) {
  if (sizeNow.by !== "by_rank") return "measured for equal ranks only";
  const known = (metricPoints() || []).filter((point) => point.rank <= now.at);
  if (!known.length) return `mean alone: ${number(DATA.sizes.function.mean)}`;
  return `${number(known.at(-1).value)} (measured at rank ${known.at(-1).rank})`;
}

function showSize() {
  const now = sizeRow();
  const set = (name, text) => { if (byId("size-" + name)) byId("size-" + name).textContent = text; };
  byId("size-bytes").dataset.bytes = now.bytes;
  set("bytes", bytes(now.bytes));
  set("exact", now.bytes.toLocaleString("en") + " bytes");
  set("ratio", now.ratio === null ? "–" : number(now.ratio) + " ×");
  for (const key of ["in_sample", "heldout", "null"]) set(key, now[key] === null ? "–" : percent(1 - now[key]));
  set("residual", percent(now.residual));
  set("ranks", !now.ranks.length ? "–" : now.ranks[0] === now.ranks[2] ? String(now.ranks[0]) : `${now.ranks[0]} to ${now.ranks[2]}, median ${now.ranks[1]}`);
  set("per-model", bytes(now.per_model));
  set("break-even", now.break_even === null ? "never" : now.break_even.toLocaleString("en") + " models");
  if (DATA.sizes.function) set("metric", metricText(now));
  byId("size-panel").dataset.by = sizeNow.by;
  byId("size-chosen").textContent = sizeNow.by === "by_rank"
    ? (now.at ? `Rank ${now.at} in every layer` : "The mean alone, rank 0")
    : `In each layer the smallest rank that keeps ${percent(now.at)} of its variance`;
}

function startSizes() {
  const sliders = { by_rank: byId("size-rank"), by_threshold: byId("size-threshold") };
  const words = {
    by_rank: (at) => (at ? "rank " + at : "rank 0, the mean alone"),
    by_threshold: (at) => percent(at) + " of variance",
  };
  for (const [by, slider] of Object.entries(sliders)) {
    if (!DATA.sizes[by].at.length) {
      slider.closest(".slider").hidden = true;
      continue;
    }
    const tell = () => {
      const text = words[by](DATA.sizes[by].at[Number(slider.value)]);
      slider.setAttribute("aria-valuetext", text);
      byId(slider.id + "-value").textContent = text;
    };
    slider.addEventListener("input", () => {
      sizeNow.by = by;
      sizeNow.place = Number(slider.value);
      tell();
      showSize();
      redraw(["sizes"]);
    });
    tell();
  }
  sizeNow.place = Number(sliders.by_rank.value);
  showSize();
}
