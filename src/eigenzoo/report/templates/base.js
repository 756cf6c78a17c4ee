// What every figure shares: the data, the theme's colours, names made harmless, drawing when seen.

const DATA = JSON.parse(document.getElementById("report-data").textContent);
const state = { layer: -1, choice: {} };
const figures = {}; // name -> (colours) => {data, layout}; filled by the files that follow
const drawn = new Set();
const NARROW = window.matchMedia("(max-width: 640px)");

const byId = (id) => document.getElementById(id);

// Plotly reads a little HTML in every text, and TeX between dollars: what comes from files is escaped before it gets there.
function plain(text, limit = 48) {
  const letters = Array.from(String(text));
  const short = letters.length > limit ? "…" + letters.slice(1 - limit).join("") : letters.join("");
  return short.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\$/g, "&#36;");
}

const minus = (text) => text.replace("-", "−");

// As `display.in_percent` writes shares.
function percent(share) {
  if (share === null || share === undefined) return "–";
  if (share > 1e4) return "> 10⁶ %";
  if (share > 0 && share < 1e-8) return "< 10⁻⁶ %";
  const value = 100 * share;
  const digits = value !== 0 && Math.abs(value) < 10 ? value.toPrecision(3) : value.toFixed(1);
  return minus(digits) + " %";
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let value = count;
  while (value >= 999.5 && units.length > 1) {
    value /= 1000;
    units.shift();
  }
  return Number(value.toPrecision(3)) + " " + units[0];
}

const number = (value) =>
  value === null || value === undefined || Number.isNaN(value) ? "–" : minus(Number(value.toPrecision(4)).toString());

function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["ink", "muted", "line", "surface", "accent", "heldout", "insample", "null", "mean", "green", "orange",
    "sky", "cold", "warm", "low", "high"];
  const found = Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--" + name).trim()]));
  found.font = getComputedStyle(document.body).fontFamily;
  return found;
}

const faded = (hex, share) => hex + Math.round(255 * share).toString(16).padStart(2, "0");

// Colour, dash and sign of each kind of number: the same all through the page.
const kinds = (c) =>
  Object.fromEntries(Object.entries(DATA.kinds).map(([name, kind]) => [name, { ...kind, color: c[kind.colour] }]));

function line(kind, x, y, more = {}) {
  return {
    type: "scatter", mode: "lines+markers", x, y, name: kind.name,
    line: { color: kind.color, dash: kind.dash, width: kind.width },
    marker: { color: kind.color, symbol: kind.symbol || "circle", size: 6 },
    hovertemplate: "%{y:.4~g}", ...more,
  };
}

// A band between two curves; the lower one is there only to be filled to.
function band(name, colour, x, low, high) {
  const edge = { type: "scatter", mode: "lines", x, line: { width: 0 } };
  return [
    { ...edge, y: low, name, hovertemplate: "from %{y:.4~g}", showlegend: false, legendgroup: name },
    { ...edge, y: high, name, hovertemplate: "to %{y:.4~g}", fill: "tonexty", fillcolor: faded(colour, 0.22), legendgroup: name },
  ];
}

function axis(c, title, more = {}) {
  return {
    title: { text: plain(title), font: { size: 12, color: c.muted }, standoff: 8 }, color: c.muted, gridcolor: c.line,
    unifiedhovertitle: { text: plain(title) + ": %{x}" }, linecolor: c.line, zeroline: false, automargin: true, ticks: "outside", tickcolor: c.line, ticklen: 4, ...more,
  };
}

// Steps of an axis of counts: whole numbers, about eight of them.
function countStep(largest) {
  const power = 10 ** Math.floor(Math.log10(Math.max(largest / 8, 1)));
  return power * [1, 2, 5, 10].find((step) => step * power >= largest / 8);
}

const countAxis = (c, title, largest, more = {}) => axis(c, title, { tick0: 0, dtick: countStep(largest), showgrid: false, ...more });

function rankAxis(c, largest, title) {
  const ticks = [];
  for (let tick = 1; tick <= Math.max(largest, 1); tick *= 2) ticks.push(tick);
  return axis(c, title, { type: "log", tickvals: ticks, ticktext: ticks.map(String), showgrid: false });
}

// Places on a log axis: one, two, five; the powers of ten alone where it spans more than so many of them.
function logTicks([low, high], most) {
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const step of high - low > most ? [1] : [1, 2, 5]) {
      const at = Math.log10(step) + power;
      if (at >= low && at <= high) ticks.push(step * 10 ** power);
    }
  }
  return ticks;
}

// Bytes on a log axis.
function bytesAxis(c, title, values) {
  const all = values.filter((value) => value > 0).map(Math.log10);
  const range = [Math.min(...all) - 0.05, Math.max(...all) + 0.05];
  const found = logTicks(range, NARROW.matches ? 1.2 : 3);
  const ticks = found.length > 1 ? found : range.map((at) => 10 ** at); // sizes that are nearly the same
  return axis(c, title, { type: "log", range, tickvals: ticks, ticktext: ticks.map(bytes), showgrid: false });
}

// Shares on a log axis, down to a ten-millionth of the largest.
function logShareAxis(c, title, curves) {
  const all = curves.flat().filter((value) => value !== null && value > 0);
  const top = Math.max(...all);
  const low = Math.min(...all.filter((value) => value > top * 1e-7));
  const range = [Math.log10(low) - 0.1, Math.log10(top) + 0.1];
  const ticks = logTicks(range, 2);
  return axis(c, title, { type: "log", range, tickvals: ticks, ticktext: ticks.map((share) => Number((100 * share).toPrecision(1)) + "%") });
}

function layout(c, x, y, more = {}) {
  return {
    paper_bgcolor: c.surface, plot_bgcolor: c.surface, font: { family: c.font, size: 12, color: c.ink },
    margin: { l: 60, r: 18, t: 18, b: 52 }, hovermode: "x unified", dragmode: "zoom",
    hoverlabel: { bgcolor: c.surface, bordercolor: c.line, font: { family: c.font, size: 12, color: c.ink }, align: "left" },
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { size: 12 }, maxheight: 0.8, tracegroupgap: 0 },
    xaxis: x, yaxis: y, ...more,
  };
}

const has = (values) => Array.isArray(values) && values.some((value) => value !== null);

function nothing(c, text = "This layer has no such numbers.") {
  const hidden = { visible: false };
  const note = { text, showarrow: false, x: 0.5, y: 0.5, xref: "paper", yref: "paper", font: { size: 14, color: c.muted } };
  return { data: [], layout: layout(c, hidden, hidden, { annotations: [note] }) };
}

function draw(name) {
  const box = byId("plot-" + name);
  if (!box || !figures[name]) return;
  const figure = figures[name](colours());
  const rows = figure.data.filter((trace) => trace.name && trace.showlegend !== false).length;
  if (NARROW.matches && !figure.layout.height && rows > 3) figure.layout.height = 290 + 19 * rows; // one row each in the legend
  const height = figure.layout.height;
  box.style.height = height ? height + "px" : "";
  const config = { displayModeBar: false, responsive: true, doubleClick: "reset" };
  Plotly.react(box, figure.data, figure.layout, config).then(() => box.setAttribute("data-drawn", "true"));
  drawn.add(name);
}

const redraw = (names) => names.filter((name) => drawn.has(name)).forEach(draw);

async function unpack(section) {
  const packed = Uint8Array.from(atob(byId("csv-" + section).textContent.trim()), (char) => char.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Blob([await new Response(stream).arrayBuffer()], { type: "text/csv" });
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
