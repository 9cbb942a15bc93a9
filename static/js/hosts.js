// Hosts: buttons that copy what stands in a <pre>, and times of day in the reader's zone.
(() => {
  const { kangaroo } = window;

  // The clipboard is there on https and on localhost only; elsewhere the text is selected, and copied the old way.
  const copy = async (element) => {
    const text = element.textContent;
    if (navigator.clipboard) {
      try {
        await navigator.clipboard.writeText(text);
        return true;
      } catch {
        // not allowed: the old way
      }
    }
    const range = document.createRange();
    range.selectNodeContents(element);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    return document.execCommand("copy");
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("[data-copy]");
    if (!button) return;
    const done = await copy(document.getElementById(button.dataset.copy));
    const words = done ? "Copied" : "Selected: copy it with the keyboard";
    const before = (button.dataset.words ??= button.textContent);
    button.textContent = words;
    kangaroo.announce(words);
    setTimeout(() => { button.textContent = before; }, 2_500);
  });
})();
