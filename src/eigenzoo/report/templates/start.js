// Wires the page: choices, theme, downloads, drawing when seen.

const BY_LAYER = Object.keys(DATA.figures).filter((name) => DATA.figures[name].by_layer);

function startLayers() {
  const selects = [...document.querySelectorAll("select.layer")];
  for (const select of selects) {
    DATA.by_name.forEach((place) => select.append(new Option(DATA.layers[place].name, place)));
    select.addEventListener("change", () => {
      state.layer = Number(select.value);
      selects.forEach((other) => { other.value = select.value; });
      document.querySelectorAll(".layer-sentence").forEach((box) => {
        box.textContent = state.layer < 0 ? "" : DATA.layers[state.layer].sentence;
      });
      redraw(BY_LAYER);
    });
  }
}

function startChoices() {
  for (const select of document.querySelectorAll("select.quantity")) {
    select.addEventListener("change", () => {
      state.choice[select.dataset.figure] = select.value;
      redraw([select.dataset.figure]);
    });
  }
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : window.matchMedia("(prefers-color-scheme: dark)").matches;
}

function startTheme() {
  const button = byId("theme");
  const tell = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Switch to the light theme" : "Switch to the dark theme");
  };
  const follow = () => {
    tell();
    redraw([...drawn]);
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    follow();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", follow);
  NARROW.addEventListener("change", () => {
    drawn.forEach((name) => Plotly.purge(byId("plot-" + name))); // an update keeps the margins of the other width
    redraw([...drawn]);
  });
  tell();
}

function startDownloads() {
  for (const button of document.querySelectorAll("button.csv")) {
    button.addEventListener("click", async () => save(await unpack(button.dataset.section), `eigenzoo-${button.dataset.section}.csv`));
  }
  for (const button of document.querySelectorAll("button.picture")) {
    button.addEventListener("click", () => {
      const box = byId("plot-" + button.dataset.figure);
      if (!drawn.has(button.dataset.figure)) draw(button.dataset.figure);
      const size = { width: box.clientWidth, height: box.clientHeight };
      Plotly.downloadImage(box, { format: button.dataset.format, filename: `eigenzoo-${button.dataset.figure}`, scale: button.dataset.format === "png" ? 2 : 1, ...size });
    });
  }
}

function startDrawing() {
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      draw(entry.target.dataset.figure);
    }
  }, { rootMargin: "300px 0px" });
  document.querySelectorAll(".plot").forEach((box) => watcher.observe(box));
  // Paper has the static figures, and every table in full.
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((box) => { box.open = true; }));
}

// Marks the section that is read in the list of sections.
function startContents() {
  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach((link) => link.removeAttribute("aria-current"));
      const link = links.get(entry.target.id);
      if (!link) continue;
      link.setAttribute("aria-current", "true");
      const list = link.closest("ul");
      list.scrollLeft = link.offsetLeft - list.clientWidth / 2;
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach((section) => watcher.observe(section));
}

startLayers();
startChoices();
startTheme();
startDownloads();
if (DATA.sizes) startSizes();
if (DATA.suitability) startSuitability();
startDrawing();
startContents();
