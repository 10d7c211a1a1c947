// The picture of the neuron map: a click, or the arrow keys and Enter, choose a neuron.
const dots = () => [...element.querySelectorAll(".nv-neuron")];
const choose = (dot) => {
    for (const other of dots()) other.classList.toggle("nv-chosen", other === dot);
    trigger("select", { module: dot.dataset.module, index: Number(dot.dataset.index) });
};
const walkTo = (dot) => {
    for (const other of dots()) other.setAttribute("tabindex", other === dot ? "0" : "-1");
    dot.focus();
};
element.addEventListener("click", (event) => {
    const dot = event.target.closest(".nv-neuron");
    if (dot) { walkTo(dot); choose(dot); }
});
element.addEventListener("keydown", (event) => {
    const dot = event.target.closest(".nv-neuron");
    if (!dot) return;
    const all = dots(), place = all.indexOf(dot), row = Number(dot.dataset.row), x = Number(dot.getAttribute("cx"));
    const nearest = (wanted) => all.filter((one) => Number(one.dataset.row) === wanted)
        .sort((a, b) => Math.abs(a.getAttribute("cx") - x) - Math.abs(b.getAttribute("cx") - x))[0];
    const goal = { ArrowRight: all[place + 1], ArrowLeft: all[place - 1], ArrowDown: nearest(row + 1), ArrowUp: nearest(row - 1) };
    if (event.key in goal) { event.preventDefault(); if (goal[event.key]) walkTo(goal[event.key]); }
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(dot); }
});
