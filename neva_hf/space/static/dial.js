// The control: values on a circle, and the same values as a list of sliders. One truth (`dials`), drawn by `draw`.
// Gradio runs this as the body of a function with `element`, `props` and `watch`. Every text that a map brings is set
// as text, never as markup.
const SVG = "http://www.w3.org/2000/svg";
const OUTER = 150, ZERO = 82, INNER = 16;  // radii: furthest out, strength 0, furthest in
const WIDE = 278, HIGH = 194;              // half of the picture, with the labels
const LINE = 15;                           // letters in a line of a label
const NATS = 0.25;                         // an expected shift of so much is drawn as far out as a dial at 1
const PHONE = 640;                         // in a narrower window the sliders are folded away at first

let spec = props.spec, dials = {}, effects = props.effects, shown = null, sent = 0, told = "", timer = null;
const parts = {};

function make(tag, attributes, ...children) {
    const svg = ["svg", "path", "circle", "g", "line", "title", "text", "tspan", "defs", "pattern", "polygon"];
    const node = svg.includes(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
    node.append(...children);
    return node;
}

const signed = (s) => (s > 0 ? "+" : s < 0 ? "−" : "") + String(Math.round(Math.abs(s) * 100) / 100);
const tidy = (s) => { const r = Math.round(s * 10) / 10; return Math.abs(r) < 0.05 ? 0 : r; };
const within = (s) => Math.max(-spec.reach, Math.min(spec.reach, s));
const radius = (s) => ZERO + (s >= 0 ? s * (OUTER - ZERO) : s * (ZERO - INNER)) / spec.reach;
const strengthAt = (r) => within(r >= ZERO ? (r - ZERO) / (OUTER - ZERO) * spec.reach : (r - ZERO) / (ZERO - INNER) * spec.reach);
const point = (r, turn) => { const a = (turn - 90) * Math.PI / 180; return [r * Math.cos(a), r * Math.sin(a)].map((x) => x.toFixed(2)); };
const beyond = (v, s) => s < v.low || s > v.high;

function wedge(from, to, low, high) {
    const [a, b] = [Math.min(from, to), Math.max(from, to)];
    const corner = (r, t) => point(r, t).join(" ");
    const big = high - low > 180 ? 1 : 0;
    return `M ${corner(b, low)} A ${b} ${b} 0 ${big} 1 ${corner(b, high)} L ${corner(a, high)} A ${a} ${a} 0 ${big} 0 ${corner(a, low)} Z`;
}

// -- building, once per map ------------------------------------------------------------------------------------------

function build() {
    element.classList.add("nv-dial");
    const presets = make("div", { class: "nv-presets", role: "group", "aria-label": "Characters to begin with" });
    parts.presets = spec.presets.map((preset) => {
        const button = make("button", { type: "button", class: "nv-chip", title: preset.text }, preset.name);
        button.addEventListener("click", () => { dials = { ...preset.dials }; show(null); tell(true); });
        presets.append(button);
        return button;
    });
    parts.reset = make("button", { type: "button", class: "nv-chip nv-reset" }, "Reset");
    parts.reset.setAttribute("aria-label", "Reset: all dials to 0");
    parts.reset.addEventListener("click", () => { dials = {}; show(null); tell(true); });
    presets.append(parts.reset);

    parts.list = make("div", { class: "nv-sliders" });
    parts.rows = spec.values.map(slider);
    parts.list.append(...parts.rows.map((row) => row.box));
    parts.details = make("details", { class: "nv-list" }, make("summary", {}, "Sliders"), parts.list);
    parts.note = make("p", { class: "nv-note" });
    parts.warning = make("p", { class: "nv-warning", role: "status" });
    element.replaceChildren(presets, make("div", { class: "nv-control" }, circle(), parts.details), parts.note, parts.warning);
    parts.details.open = window.innerWidth >= PHONE;
    shown = null;
    draw();
}

// A label in at most two lines, each cut where it would leave the picture; the list of sliders has all of it.
function lines(label) {
    if (label.length <= LINE) return [label];
    const breaks = [...label.matchAll(/\s+/g)].map((found) => found.index);
    const at = breaks.sort((a, b) => Math.abs(a - label.length / 2) - Math.abs(b - label.length / 2))[0];
    const cut = (text) => text.length > LINE ? text.slice(0, LINE - 1) + "…" : text;
    return (at === undefined ? [label] : [label.slice(0, at), label.slice(at).trim()]).map(cut);
}

function circle() {
    const half = 180 / spec.values.length;
    const svg = make("svg", { viewBox: `${-WIDE} ${-HIGH} ${2 * WIDE} ${2 * HIGH}`, class: "nv-circle", role: "img" });
    const hatch = make("pattern", { id: "nv-hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
        make("line", { x1: 0, y1: 0, x2: 0, y2: 6, class: "nv-hatch" }));
    svg.append(make("defs", {}, hatch));
    const back = make("g"), front = make("g"), labels = make("g"), handles = make("g");
    parts.wedges = []; parts.dots = []; parts.handles = []; parts.labels = []; parts.sectors = [];
    for (const value of spec.values) {
        const [low, high] = [value.angle - half + 0.7, value.angle + half - 0.7];
        const sector = make("g", { class: "nv-sector", style: `--hue:${value.hue}` });
        sector.append(
            make("path", { d: wedge(INNER, OUTER, low, high), class: "nv-all" }),
            make("path", { d: wedge(radius(value.low), radius(value.high), low, high), class: "nv-fluent" }),
            make("path", { d: wedge(radius(value.high), OUTER, low, high), class: "nv-beyond" }),
            make("path", { d: wedge(INNER, radius(value.low), low, high), class: "nv-beyond" }),
        );
        const filled = make("path", { class: "nv-filled", "data-value": value.name });
        sector.append(filled);
        const sideways = Math.abs(Math.sin(value.angle * Math.PI / 180)) > 0.9;
        const [x, y] = point(OUTER + (sideways ? 10 : 15), value.angle);
        const side = Math.abs(x) < 20 ? "middle" : x > 0 ? "start" : "end";
        const amount = make("tspan", { x, dy: "1.15em", class: "nv-amount" });
        const words = lines(value.label).map((text, line) => make("tspan", { x, dy: line ? "1.1em" : 0 }, text));
        const lift = (y < -100 ? -12 : y > 100 ? 8 : -4) - (words.length > 1 ? (y > 100 ? 4 : 12) : 0);
        const label = make("text", { x, y: Number(y) + lift, "text-anchor": side, class: "nv-label", style: `--hue:${value.hue}` },
            make("title", {}, value.label), ...words, amount);
        const handle = make("circle", { r: 9, class: "nv-handle", "data-value": value.name, style: `--hue:${value.hue}` }, make("title", {}, `Drag ${value.label}`));
        const dot = make("circle", { r: 3.4, class: "nv-dot" });
        back.append(sector); labels.append(label); handles.append(handle); front.append(dot);
        parts.wedges.push(filled); parts.dots.push(dot); parts.handles.push(handle); parts.labels.push(amount); parts.sectors.push(sector);
        aim(sector, value, false); aim(label, value, false); aim(handle, value, true);
    }
    parts.shape = make("polygon", { class: "nv-shape" });
    svg.append(back);
    for (let ring = 1; ring < spec.reach; ring += 1) {
        svg.append(make("circle", { r: radius(ring), class: "nv-ring" }), make("circle", { r: radius(-ring), class: "nv-ring" }));
    }
    svg.append(make("circle", { r: ZERO, class: "nv-zero" }));
    for (const at of [1, 2, 3].filter((ring) => ring < spec.reach)) {
        const [x, y] = point(radius(at), 180 + half);
        svg.append(make("text", { x, y: Number(y) + 3, class: "nv-tick" }, "+" + at));
    }
    front.prepend(parts.shape);
    svg.append(labels, handles, front);
    parts.svg = svg;
    return svg;
}

// A press on a sector or a label sets the strength; on a touch screen only the handle can be dragged, so that a finger
// on the circle still scrolls the page.
function aim(node, value, isHandle) {
    const set = (event) => {
        const box = parts.svg.getBoundingClientRect(), scale = 2 * WIDE / box.width;
        const x = (event.clientX - box.left) * scale - WIDE, y = (event.clientY - box.top) * scale - HIGH;
        const along = (value.angle - 90) * Math.PI / 180;
        const out = Math.max(0, x * Math.cos(along) + y * Math.sin(along));
        turn(value.name, Math.abs(strengthAt(out)) < 0.15 ? 0 : strengthAt(out), false);
    };
    node.addEventListener("pointerenter", () => show(value));
    node.addEventListener("pointerleave", () => show(null));
    node.addEventListener("pointerdown", (event) => {
        if (event.button !== 0 || (event.pointerType === "touch" && !isHandle)) return;
        event.preventDefault();
        const move = (later) => set(later);
        const end = () => {
            window.removeEventListener("pointermove", move);
            for (const name of ["pointerup", "pointercancel"]) window.removeEventListener(name, end);
            tell(true);
        };
        window.addEventListener("pointermove", move);
        for (const name of ["pointerup", "pointercancel"]) window.addEventListener(name, end);
        if (!isHandle) set(event);
    });
    node.addEventListener("click", (event) => {
        if (event.pointerType === "touch" && !isHandle) { set(event); show(value); tell(true); }
    });
    if (isHandle) node.addEventListener("dblclick", () => { turn(value.name, 0, true); });
}

function slider(value) {
    const id = `nv-slider-${value.name}`;
    const input = make("input", { type: "range", id, min: -spec.reach, max: spec.reach, step: 0.1, value: 0, style: track(value) });
    const output = make("output", { for: id, class: "nv-number" });
    const box = make("div", { class: "nv-row", style: `--hue:${value.hue}` }, make("label", { for: id }, value.label), input, output);
    input.addEventListener("input", () => turn(value.name, tidy(Number(input.value)), false));
    input.addEventListener("change", () => tell(true));
    input.addEventListener("focus", () => show(value));
    input.addEventListener("blur", () => show(null));
    box.addEventListener("pointerenter", () => show(value));
    box.addEventListener("pointerleave", () => show(null));
    return { box, input, output };
}

function track(value) {
    const place = (s) => `${((s + spec.reach) / (2 * spec.reach) * 100).toFixed(1)}%`;
    return `--low:${place(value.low)};--high:${place(value.high)}`;
}

// -- drawing, at every change ----------------------------------------------------------------------------------------

function draw() {
    const half = 180 / spec.values.length, far = [];
    spec.values.forEach((value, i) => {
        const s = dials[value.name] || 0, out = beyond(value, s);
        const [low, high] = [value.angle - half + 0.7, value.angle + half - 0.7];
        parts.wedges[i].setAttribute("d", s ? wedge(ZERO, radius(s), low, high) : "");
        parts.wedges[i].classList.toggle("nv-less", s < 0);
        parts.sectors[i].classList.toggle("nv-far", out);
        const [x, y] = point(radius(s), value.angle);
        parts.handles[i].setAttribute("cx", x); parts.handles[i].setAttribute("cy", y);
        parts.handles[i].classList.toggle("nv-on", s !== 0);
        parts.labels[i].textContent = s ? signed(s) : "";
        const row = parts.rows[i];
        if (document.activeElement !== row.input || Number(row.input.value) !== s) row.input.value = s;
        row.output.textContent = signed(s);
        row.box.classList.toggle("nv-on", s !== 0);
        row.box.classList.toggle("nv-far", out);
        row.input.setAttribute("aria-valuetext", signed(s).replace("−", "minus ").replace("+", "plus ") + (out ? ", beyond the fluent range" : ""));
        if (out) far.push(`${value.label} at ${signed(s)} (fluent from ${signed(value.low)} to ${signed(value.high)})`);
    });
    parts.presets.forEach((button, i) => {
        const wanted = spec.presets[i].dials, names = new Set([...Object.keys(wanted), ...Object.keys(dials)]);
        button.setAttribute("aria-pressed", [...names].every((name) => Math.abs((wanted[name] || 0) - (dials[name] || 0)) < 1e-9));
    });
    const words = far.length ? `Beyond what is known to stay fluent: ${far.join(", ")}. Expect worse text.` : "";
    if (parts.warning.textContent !== words) parts.warning.textContent = words;
    const turned = spec.values.filter((value) => dials[value.name]).map((value) => `${value.label} ${signed(dials[value.name])}`);
    parts.svg.setAttribute("aria-label", `Circle of values, turned: ${turned.join(", ") || "none"}. The sliders do the same.`);
    drawEffects();
}

function drawEffects() {
    show(shown);
    const moved = effects && Object.values(effects).some((shift) => shift !== 0);
    parts.svg.classList.toggle("nv-moved", Boolean(moved));
    if (!moved) return;
    const corners = spec.values.map((value, i) => {
        const shift = effects[value.name] || 0, place = point(radius(within(shift / NATS)), value.angle);
        parts.dots[i].setAttribute("cx", place[0]); parts.dots[i].setAttribute("cy", place[1]);
        parts.dots[i].classList.toggle("nv-target", Boolean(dials[value.name]));
        return place.join(",");
    });
    parts.shape.setAttribute("points", corners.join(" "));
}

function show(value) {
    shown = value;
    parts.note.replaceChildren();
    if (value) {
        const shift = effects && effects[value.name];
        parts.note.append(make("b", {}, `${value.label}. `), value.definition);
        if (shift) parts.note.append(` Expected to move by ${signed(shift)} nats per token.`);
    } else {
        parts.note.append("Drag a value outward for more of it, inward for less; the tinted part stays fluent. The dashed line shows how far each value is expected to move.");
    }
}

// -- changes ---------------------------------------------------------------------------------------------------------

function turn(name, strength, last) {
    const s = tidy(within(strength)), next = { ...dials };
    delete next[name];
    if (s) next[name] = s;
    dials = next;
    draw();
    tell(last);
}

// While a dial is being dragged the page hears of it a few times a second; the last setting is always told.
function tell(last) {
    draw();
    clearTimeout(timer);
    const push = () => {
        sent = Date.now();
        if (JSON.stringify(dials) === told) return;
        told = JSON.stringify(dials);
        props.value = { ...dials };
    };
    if (last || Date.now() - sent > 250) push(); else timer = setTimeout(push, 250);
}

watch(["value", "spec", "effects"], () => {
    const isNew = JSON.stringify(props.spec) !== JSON.stringify(spec);
    spec = props.spec; effects = props.effects;
    // What comes back of our own must not undo what has been turned since.
    if (JSON.stringify(props.value) !== told) { dials = { ...props.value }; told = JSON.stringify(dials); }
    if (isNew) build(); else draw();
});

dials = { ...props.value };
told = JSON.stringify(dials);
// (Gradio drops container queries from a page's style)
new ResizeObserver(([seen]) => {
    element.classList.toggle("nv-beside", seen.contentRect.width >= 600);
    element.classList.toggle("nv-double", seen.contentRect.width >= 420 && seen.contentRect.width < 600);
}).observe(element);
build();
