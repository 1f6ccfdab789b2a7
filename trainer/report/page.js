// What the lines of a chart say where the pointer is. The page is whole without it.
for (const plot of document.querySelectorAll(".plot")) {
  const lines = [...plot.querySelectorAll("path[data-told]")].map((path) => {
    const at = path.getAttribute("d").slice(1).split("L").map((pair) => parseFloat(pair) / 1000);
    return { path, at, told: path.dataset.told.split(";").map((pair) => pair.split("|")) };
  });
  if (!lines.length) continue;
  const cross = document.createElement("div");
  const box = document.createElement("div");
  cross.className = "cross";
  box.className = "told";

  const nearest = (at, x) => at.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(at[best] - x) ? i : best), 0);
  const row = (left, right, path) => {
    const line = document.createElement("p");
    if (path) {
      const key = document.createElement("span");
      key.className = "key " + path.getAttribute("class");
      line.append(key);
    }
    const value = document.createElement("b");
    value.textContent = right;
    line.append(left, value);
    return line;
  };
  const show = (event) => {
    const frame = plot.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width;
    // The point nearest to the pointer, of whatever line; then what each line has nearest to that.
    const found = lines.map((line) => nearest(line.at, x));
    const lead = lines.reduce((best, line, i) => (Math.abs(line.at[found[i]] - x) < Math.abs(lines[best].at[found[best]] - x) ? i : best), 0);
    const place = lines[lead].at[found[lead]];
    const across = plot.parentElement.querySelector(":scope > b").textContent;
    box.replaceChildren(row(across, lines[lead].told[found[lead]][0]));
    for (const line of lines) box.append(row(line.path.dataset.name, line.told[nearest(line.at, place)][1], line.path));
    cross.style.left = box.style.left = 100 * place + "%";
    box.style.transform = place > 0.5 ? "translateX(calc(-100% - 10px))" : "translateX(10px)";
    plot.append(cross, box);
  };
  const hide = () => (cross.remove(), box.remove());
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
