// Draw every figure; put its panels into one column where the screen is narrow.
const narrow = window.matchMedia("(max-width: 760px)");
for (const holder of document.querySelectorAll(".figure")) {
  const { data, layout, arrangements } = JSON.parse(
    document.getElementById(holder.dataset.source).textContent,
  );
  const arrange = () => {
    if (arrangements) Plotly.relayout(holder, arrangements[narrow.matches ? "narrow" : "wide"]);
  };
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  Plotly.newPlot(holder, data, layout, config).then(arrange);
  narrow.addEventListener("change", arrange);
}
