"use strict";
// Asks for the token, and replaces this page by the one that the token opens. The address stays the same, so that a
// reload comes back here, where the token that this tab has kept is tried first.
(() => {
  const KEY = "fluxvae-token";
  const form = document.getElementById("token-form");
  const field = document.getElementById("token");
  const error = document.getElementById("token-error");

  async function enter(token, refused) {
    let answer;
    try {
      answer = await fetch("/", { headers: { Authorization: `Bearer ${token}`, Accept: "text/html" } });
    } catch {
      return tell("The server does not answer. Try again in a moment.");
    }
    if (!answer.ok) {
      sessionStorage.removeItem(KEY);
      return tell(answer.status === 401 ? refused : `The server answered ${answer.status}. Try again in a moment.`);
    }
    const page = await answer.text();
    sessionStorage.setItem(KEY, token);
    document.open();
    document.write(page);
    document.close();
  }

  function tell(message) {
    error.textContent = message;
    error.hidden = !message;
    field.focus();
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    // A header can carry only these characters, and fetch would throw for others.
    if (/^[!-~]+$/.test(field.value.trim())) enter(field.value.trim(), "That is not the token.");
    else tell("That is not the token: it has letters, digits and signs, without spaces.");
  });
  const kept = sessionStorage.getItem(KEY);
  if (kept) enter(kept, "The token is no longer valid.");
})();
