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

  // <span data-clock>: the time of day, with the date where it is another day's.
  const time = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
  const date = new Intl.DateTimeFormat(undefined, { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
  const clocks = (root) => {
    for (const clock of root.querySelectorAll("[data-clock]")) {
      const at = new Date(clock.dataset.clock);
      if (Number.isNaN(at.getTime())) continue;
      const today = at.toDateString() === new Date().toDateString();
      clock.textContent = (today ? time : date).format(at);
    }
  };
  clocks(document);
  document.addEventListener("htmx:oobAfterSwap", (event) => clocks(document.getElementById(event.detail.target.id) ?? document));
})();
