// Copy buttons beside answers and code. What is copied is the text beside the button, as it is read.
element.addEventListener("click", (event) => {
    const button = event.target.closest(".nv-copy");
    if (!button) return;
    const text = button.closest("section, details").querySelector(".nv-text, code").textContent;
    const said = (word) => { button.textContent = word; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
    if (!navigator.clipboard) { said("Not allowed"); return; }
    navigator.clipboard.writeText(text).then(() => said("Copied"), () => said("Not allowed"));
});
// The newest words of a long conversation stay in sight, unless the reader has scrolled up.
let atEnd = true;
element.addEventListener("scroll", (event) => {
    const box = event.target;
    atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}, true);
watch("value", () => {
    const box = element.querySelector(".nv-talk");
    if (box && atEnd) box.scrollTop = box.scrollHeight;
});
