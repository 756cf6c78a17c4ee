// Suitability of layers by the exponents of their spectra, with thresholds that move.

// exponents: per layer a list, one of each random half of the zoo; empty where there is none.
// thresholds: {low, high, spread, share, q}. Returns per layer its numbers and what holds, and the places of the retained.
function suitability(exponents, thresholds) {
  const layers = exponents.map((values) => {
    if (!values.length) return null;
    const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
    const spread = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / values.length);
    const inside = values.filter((value) => value >= thresholds.low && value <= thresholds.high).length;
    const share = inside / values.length;
    const q = share / (1 + spread);
    const ok = {
      mean: mean >= thresholds.low && mean <= thresholds.high,
      spread: spread <= thresholds.spread,
      share: share >= thresholds.share,
      q: q >= thresholds.q,
    };
    return { mean, spread, share, q, ok, retained: Object.values(ok).every(Boolean) };
  });
  return { layers, retained: layers.flatMap((layer, place) => (layer && layer.retained ? [place] : [])) };
}

const LIMITS = ["low", "high", "spread", "share", "q"];

function thresholdsNow() {
  return Object.fromEntries(LIMITS.map((name) => [name, Number(byId("limit-" + name).value)]));
}

function showSuitability() {
  const found = suitability(DATA.suitability.exponents, thresholdsNow());
  const known = found.layers.filter((layer) => layer);
  const tell = (name, count) => { byId("suitable-" + name).textContent = `${count} of ${known.length} layers`; };
  tell("retained", found.retained.length);
  for (const part of ["mean", "spread", "share", "q"]) tell(part, known.filter((layer) => layer.ok[part]).length);
}

function startSuitability() {
  for (const name of LIMITS) {
    const slider = byId("limit-" + name);
    const tell = () => {
      const text = name === "share" ? percent(Number(slider.value)) : number(Number(slider.value));
      slider.setAttribute("aria-valuetext", text);
      byId("limit-" + name + "-value").textContent = text;
    };
    slider.addEventListener("input", () => {
      tell();
      showSuitability();
      redraw(["suitability"]);
    });
    tell();
  }
  showSuitability();
}
