// Draws every figure (in one column on narrow screens) and connects legends and downloads.
const narrow = window.matchMedia("(max-width: 760px)");
const config = { responsive: true, displaylogo: false, displayModeBar: false };

// Merge the settings of `extra` into `base`, recursively.
function merged(base, extra) {
  const found = { ...base };
  for (const [name, value] of Object.entries(extra ?? {})) {
    const nested = value !== null && typeof value === "object" && !Array.isArray(value);
    found[name] = nested ? merged(base[name] ?? {}, value) : value;
  }
  return found;
}

async function draw(chart) {
  const holder = chart.querySelector(".figure");
  const content = chart.querySelector("script").textContent;
  const { data, layout, arrangements } = JSON.parse(content);
  const arranged = () => {
    const chosen = arrangements?.[narrow.matches ? "narrow" : "wide"];
    const dragmode = narrow.matches ? false : "zoom"; // a phone scrolls by dragging
    return merged({ ...layout, dragmode }, chosen);
  };
  await Plotly.newPlot(holder, data, arranged(), config);
  narrow.addEventListener("change", () => Plotly.react(holder, holder.data, arranged(), config));
  connectLegend(chart, holder);
  for (const button of chart.querySelectorAll("[data-format]")) {
    button.addEventListener("click", () => download(chart, holder, button.dataset.format));
  }
}

function connectLegend(chart, holder) {
  const buttons = [...chart.querySelectorAll("[data-group]")];
  const show = (chosen) => {
    for (const button of buttons) {
      button.setAttribute("aria-pressed", String(chosen.has(button.dataset.group)));
    }
    const visible = holder.data.map((t) => !t.legendgroup || chosen.has(t.legendgroup));
    return Plotly.restyle(holder, { visible });
  };
  const pressed = () =>
    new Set(buttons.filter((b) => b.ariaPressed === "true").map((b) => b.dataset.group));
  for (const button of buttons) {
    const { group } = button.dataset;
    button.addEventListener("click", () => {
      const chosen = pressed();
      if (!chosen.delete(group)) chosen.add(group);
      show(chosen);
    });
    button.addEventListener("dblclick", () => {
      const all = buttons.map((b) => b.dataset.group);
      const others = all.filter((name) => name !== group && name !== "edge");
      const before = pressed();
      const alone = before.has(group) && !others.some((name) => before.has(name));
      show(new Set(alone ? all : [group, "edge"]));
    });
  }
}

// The downloaded image has its own legend, above the panels.
function download(chart, holder, format) {
  const layout = merged(holder.layout, {});
  const { width, height } = holder.getBoundingClientRect();
  const names = holder.data.filter((t) => t.showlegend !== false && t.visible !== false);
  let extra = 0;
  if (names.length > 1) {
    const longest = Math.max(...names.map((t) => (t.name ?? "").length));
    const inRow = Math.max(1, Math.floor(width / (60 + 7.5 * longest)));
    extra = 14 + 22 * Math.ceil(names.length / inRow);
    const legend = { orientation: "h", x: 0, y: 1, yanchor: "top", yref: "container" };
    layout.legend = { ...legend, font: { size: 12 } };
    layout.showlegend = true;
    layout.margin = { ...layout.margin, t: layout.margin.t + extra };
    layout.height = height + extra;
  }
  const size = { width: Math.round(width), height: Math.round(height + extra) };
  const options = { format, filename: chart.id, scale: format === "png" ? 2 : 1, ...size };
  return Plotly.downloadImage({ data: holder.data, layout, config }, options);
}

for (const chart of document.querySelectorAll(".chart")) {
  await draw(chart);
  await new Promise((resolve) => setTimeout(resolve)); // keeps the page responsive
}
document.documentElement.dataset.drawn = "true";
