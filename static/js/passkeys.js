// Around allauth's passkey scripts: shows what needs passkeys ([data-passkey]) only where the browser has them, says
// elsewhere why not ([data-no-passkey]), and says in #passkey-problem why one could not be used.
(() => {
  const problem = document.getElementById("passkey-problem");

  // The address bar's own words for the cause; IP addresses cannot have passkeys, whatever the browser.
  const here = location.hostname;
  let why = "";
  if (/^[\d.]+$|^\[/.test(here)) {
    why = here.startsWith("127.") || here === "[::1]"
      ? `Passkeys belong to a name, not to an IP address. Open the site as http://localhost:${location.port}/ instead.`
      : "Passkeys belong to a name, not to an IP address. This site has to be reached by its name, over https.";
  } else if (!isSecureContext) {
    why = "Passkeys work over https alone, or where the site runs on this very machine (localhost).";
  } else if (!window.PublicKeyCredential) {
    why = "This browser knows no passkeys.";
  }
  for (const each of document.querySelectorAll("[data-passkey]")) each.hidden = why !== "";
  for (const each of document.querySelectorAll("[data-no-passkey]")) {
    each.hidden = why === "";
    each.textContent = why;
  }

  const PROBLEMS = {
    NotAllowedError: "No passkey was given: it was cancelled or took too long, or there is none for this site here.",
    InvalidStateError: "There is a passkey for this account in this place already.",
    NotSupportedError: "This device or key cannot keep a passkey of the kind that is needed.",
    SecurityError: "The browser does not allow passkeys at this address.",
    ConstraintError: "This device or key cannot check who holds it: it needs a PIN, a finger or a face first.",
    AbortError: "It was cancelled.",
    TypeError: "The site cannot be reached.",
  };
  document.addEventListener("allauth.error", (event) => {
    event.preventDefault(); // it is said here, so not in the console
    const { name } = event.detail.exception;
    problem.textContent = PROBLEMS[name] ?? `The passkey could not be used (${name}).`;
    problem.hidden = false;
  });
})();
