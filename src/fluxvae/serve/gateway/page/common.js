"use strict";
// What all parts of the page need: the elements by their ids, words for numbers, and talking to the server.
const Page = (() => {
  const $ = (id) => document.getElementById(id);
  const token = sessionStorage.getItem("fluxvae-token");
  const authorization = token ? { Authorization: `Bearer ${token}` } : {};

  // Returns the response, or throws an Error whose message can be shown.
  async function ask(path, options = {}) {
    let response;
    try {
      response = await fetch(path, { ...options, headers: { ...authorization, ...options.headers } });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (response.status === 401 && token) location.reload(); // the token is no longer valid: the page asks for it again
    if (!response.ok) throw new Error(await messageOf(response));
    return response;
  }

  async function messageOf(response) {
    try {
      return (await response.json()).error;
    } catch {
      return `The server answered ${response.status} ${response.statusText}`;
    }
  }

  // Returns what an answer says of itself: the seconds in Triton, a warning or null, and the request's id.
  function told(response) {
    const timing = Object.fromEntries(
      (response.headers.get("Server-Timing") ?? "").split(", ").map((part) => part.split(";dur=")),
    );
    return {
      triton: Number(timing.triton),
      warning: response.headers.get("X-Fluxvae-Warning"),
      id: response.headers.get("X-Request-ID"),
    };
  }

  const text = (id, content) => {
    if ($(id)) {
      $(id).textContent = content;
      $(id).hidden = content === "";
    }
  };
  const seconds = (ms) => (ms < 10000 ? `${(ms / 1000).toFixed(2)} s` : `${(ms / 1000).toFixed(0)} s`);
  const count = (number) => (number === null ? null : number.toLocaleString("en"));
  function bytes(number) {
    const steps = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    const step = Math.min(steps.length - 1, Math.floor(Math.log2(Math.max(number, 1)) / 10));
    return `${(number / 1024 ** step).toFixed(step ? 1 : 0)} ${steps[step]}`;
  }
  function element(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }
  function list(id, rows) {
    $(id).replaceChildren(...rows.flatMap(([name, what]) => [element("dt", {}, name), element("dd", {}, what)]));
    $(id).hidden = false;
  }
  function tell(message) {
    $("error").hidden = message === null;
    $("error").textContent = message ?? "";
  }

  return { $, token, ask, told, text, seconds, count, bytes, element, list, tell };
})();
