"use strict";
// What the server is, whether it is ready, and its live numbers.
const Server = (() => {
  const { $, token, ask, text, count, bytes, element, list, tell } = Page;
  const METRICS_EVERY_MS = 3000;

  // Returns what /info tells. It is asked once, but asked again after it failed: the server may just be starting.
  let known = null;
  const info = () =>
    (known ??= ask("/info")
      .then((response) => response.json())
      .catch((error) => {
        known = null;
        throw error;
      }));
  const metrics = async () => (await ask("/metrics")).text();

  // Returns the values of a metric, one for each of its labels, or of those with a label only.
  function values(page, name, label = "") {
    const named = page.split("\n").filter((line) => line.startsWith(`${name} `) || line.startsWith(`${name}{`));
    const lines = named.filter((line) => line.includes(label));
    return lines.map((line) => Number(line.slice(line.lastIndexOf(" ") + 1)));
  }

  // Returns the sum of metrics over all their labels, or null where the page has none of them.
  function sum(page, ...names) {
    const found = names.flatMap((name) => values(page, name));
    return found.length ? found.reduce((total, number) => total + number, 0) : null;
  }

  // Returns the highest peak of the models' last plans in bytes, or null where there is none.
  const peak = (page, label) => Math.max(0, ...values(page, "fluxvae_peak_bytes", label)) || null;

  // Returns the same of the last decode by the first model that decodes.
  const decoderPeak = async () => peak(await metrics(), `model="${(await info()).model}"`);

  async function refresh() {
    try {
      const page = await metrics();
      const pixels = sum(page, "fluxvae_megapixels_total");
      const took = sum(page, "fluxvae_decode_seconds_total", "fluxvae_encode_seconds_total");
      const encodes = sum(page, "fluxvae_encodes_total");
      const most = peak(page);
      const tiles = [
        ["decodes", count(sum(page, "fluxvae_decodes_total"))],
        ...(encodes === null ? [] : [["encodes", count(encodes)]]),
        ["megapixels", pixels?.toFixed(1)],
        ["megapixels/s", pixels && took ? (pixels / took).toFixed(2) : null],
        ["last plan’s peak", most === null ? null : bytes(most)],
        ["under way here", count(sum(page, "fluxvae_gateway_in_flight"))],
        ["waiting in Triton", count(sum(page, "nv_inference_pending_request_count"))],
        ["errors", count(sum(page, "fluxvae_errors_total") ?? (pixels === null ? null : 0))],
      ];
      $("tiles").replaceChildren(
        ...tiles.map(([name, number]) => element("div", {}, element("dt", {}, name), element("dd", {}, number ?? "–"))),
      );
      const up = sum(page, "fluxvae_gateway_triton_metrics_up") === 1;
      $("metrics-note").hidden = up;
      text("metrics-note", up ? "" : "Triton’s own metrics are out of reach: only the gateway’s are shown.");
    } catch {
      $("metrics-note").hidden = false;
      text("metrics-note", "The server does not answer; these are the last numbers it gave.");
    }
  }

  async function ready() {
    let state = ["down", "not answering"];
    try {
      const response = await fetch("/readyz");
      state = response.ok ? ["ready", "ready"] : ["down", `not ready: ${(await response.json()).reason}`];
    } catch {
      // The state stays "not answering".
    }
    $("state").dataset.state = state[0];
    if ($("state").textContent !== state[1]) text("state", state[1]);
  }

  // Shows the facts of the model that decodes, and with which checkpoint pictures are encoded.
  function show(known) {
    const { checkpoint, device, dtype, engine, memory_limit: limit } = known.settings;
    const encoder = Object.values(known.models).find((model) => model.encodes);
    list("server-facts", [
      ["Checkpoint", checkpoint ?? "demo"],
      ["Encodes", encoder ? `pictures, with ${encoder.settings.checkpoint ?? "demo"}` : "no pictures"],
      ["Device", device ?? "Triton’s choice"],
      ["Type", dtype ?? "the device’s"],
      ["Engine", engine ?? "exact"],
      ["Memory limit", limit ?? "what is free"],
      ["Largest", `${(known.limits.max_pixels / 1e6).toFixed(1)} megapixels, ${bytes(known.limits.max_request_bytes)}`],
      ["Triton", known.triton],
    ]);
    $("server").hidden = false;
  }

  // A link cannot carry the token. So what it leads to is fetched with the token and shown in a new tab.
  if (token) {
    for (const link of document.querySelectorAll("footer a")) {
      link.addEventListener("click", async (event) => {
        event.preventDefault();
        const tab = window.open("about:blank");
        try {
          const response = await ask(link.getAttribute("href"));
          const type = response.headers.get("Content-Type").startsWith("text/html") ? "text/html" : "text/plain";
          tab.location = URL.createObjectURL(new Blob([await response.text()], { type: `${type};charset=utf-8` }));
        } catch (error) {
          tab.close();
          tell(error.message);
        }
      });
    }
  }

  info().then(show).catch((error) => tell(error.message));
  ready();
  refresh();
  setInterval(() => {
    if (!document.hidden) {
      refresh();
      ready();
    }
  }, METRICS_EVERY_MS);

  return { info, decoderPeak, refresh };
})();
