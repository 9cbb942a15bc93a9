// Runs before the first paint (a blocking script in <head>), so that a page never flashes in the other theme.
// The reader's choice is kept under "theme"; without one the system's preference holds, and is followed when it changes.
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const chosen = () => {
    try {
      const kept = localStorage.getItem("theme"); // shared with Django's admin, whose third choice is "auto"
      return kept === "dark" || kept === "light" ? kept : null;
    } catch {
      return null; // storage refused: the system's preference it is
    }
  };
  const apply = () => {
    root.dataset.bsTheme = chosen() ?? (dark.matches ? "dark" : "light");
    document.dispatchEvent(new CustomEvent("kangaroo:theme", { detail: root.dataset.bsTheme }));
  };
  root.classList.add("js");
  apply();
  dark.addEventListener("change", apply);
  addEventListener("storage", (event) => event.key === "theme" && apply());

  window.kangaroo = {
    switchTheme() {
      const next = root.dataset.bsTheme === "dark" ? "light" : "dark";
      try {
        // Choosing what the system prefers anyway means "follow the system" again.
        if ((next === "dark") === dark.matches) localStorage.removeItem("theme");
        else localStorage.setItem("theme", next);
        apply();
      } catch {
        root.dataset.bsTheme = next;
      }
    },
  };
})();
