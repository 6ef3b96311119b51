"use strict";
// The decode page: sends a latents file or an example to the server, and shows the picture and what is known about it.
(() => {
  const $ = (id) => document.getElementById(id);
  const token = sessionStorage.getItem("fluxvae-token");
  const authorization = token ? { Authorization: `Bearer ${token}` } : {};
  const METRICS_EVERY_MS = 3000;

  let current = null; // the latents that were taken last: {name, bytes, shape, dtype, height, width}
  let running = null; // the AbortController of the decode under way
  let shown = []; // the object URLs of the pictures on the page

  // Talking to the server. Returns the response, or throws an Error whose message can be shown.

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

  // Taking latents and decoding them.

  // Reads a file. Decodes it at once if its size is known, and otherwise asks for the size.
  async function take(name, buffer) {
    tell(null);
    let read;
    try {
      read = Safetensors.latents(buffer);
    } catch (error) {
      $("form").hidden = true;
      $("file-name").textContent = name;
      $("file-facts").textContent = "cannot be read";
      return tell(error.message);
    }
    current = { name, ...read };
    $("file-name").textContent = name;
    const layout = Safetensors.layout(read.shape, read.height, read.width);
    const kind = layout === null ? "packed or unpacked" : layout.packed ? "packed" : "unpacked";
    $("file-facts").textContent = `${kind} (${read.shape.join(", ")}), ${read.dtype}`;
    $("form").hidden = false;
    const sized = layout === null || layout.packed;
    $("size").hidden = !sized;
    for (const side of ["height", "width"]) $(side).required = sized;
    const known = read.height !== null && read.width !== null;
    const guess = layout === null ? NaN : Math.sqrt(read.shape.at(-2)) * 16;
    $("height").value = known ? read.height : Number.isInteger(guess) ? guess : "";
    $("width").value = known ? read.width : Number.isInteger(guess) ? guess : "";
    $("size-note").hidden = !sized || known;
    $("size-note").textContent =
      layout === null
        ? `The file does not say its size, and this shape may be ${read.shape[0]} packed images or one image without its ` +
          "batch: enter the size it was made for, which tells."
        : "The file does not say its size. Several sizes can have the same number of patches: enter the one it was made for.";
    if (sized && !known) $("height").focus();
    else await decode();
  }

  async function decode() {
    running?.abort();
    const mine = (running = new AbortController());
    tell(null);
    busy(true);
    const start = performance.now();
    const clock = setInterval(() => text("stage-text", `Decoding … ${seconds(performance.now() - start)}`), 100);
    try {
      const pictures = [];
      const side = (name) => ($("size").hidden ? current[name] : Number($(name).value));
      const size = { height: side("height"), width: side("width") };
      const layout = Safetensors.layout(current.shape, size.height, size.width);
      for (let row = 0; row < layout.count; row++) pictures.push(await one(row, layout, size, mine.signal));
      show(pictures, performance.now() - start);
    } catch (error) {
      if (error.name !== "AbortError") tell(error.message);
      if (running === mine) text("stage-text", shown.length ? "" : "The picture appears here.");
    } finally {
      clearInterval(clock);
      if (running === mine) {
        running = null;
        busy(false);
      }
      refresh();
    }
  }

  // Decodes one image of the batch. The images go one by one because an encoded answer holds a single picture.
  async function one(row, layout, size, signal) {
    const { bytes, dtype } = current;
    const stride = bytes.length / layout.count;
    const query = new URLSearchParams({ dtype, output_type: "pil", image_format: "png", do_scaling: "True" });
    for (const dimension of layout.each) query.append("shape", dimension);
    // Packed latents need the size, and so do three dimensions, which can be read in two ways. Other shapes tell it.
    if (layout.packed || layout.each.length === 3) {
      for (const [name, value] of Object.entries(size)) if (value !== null) query.set(name, value);
    }
    const response = await ask(`/decode?${query}`, {
      method: "POST",
      headers: { "Content-Type": "tensor/binary", Accept: "image/png" },
      body: bytes.slice(row * stride, (row + 1) * stride),
      signal,
    });
    const timing = Object.fromEntries(
      (response.headers.get("Server-Timing") ?? "").split(", ").map((part) => part.split(";dur=")),
    );
    return {
      blob: await response.blob(),
      triton: Number(timing.triton),
      warning: response.headers.get("X-Fluxvae-Warning"),
      id: response.headers.get("X-Request-ID"),
    };
  }

  // Showing the pictures and what is known about them.

  function show(pictures, took) {
    shown.forEach((url) => URL.revokeObjectURL(url));
    shown = pictures.map((picture) => URL.createObjectURL(picture.blob));
    const stem = current.name.replace(/\.safetensors$/, "");
    const figures = pictures.map((picture, row) => {
      const name = pictures.length > 1 ? `${stem}-${row}.png` : `${stem}.png`;
      const image = element("img", { src: shown[row], alt: `The picture decoded from ${current.name}` });
      const link = element("a", { href: shown[row], download: name, className: "button" }, `Save ${name}`);
      const figure = element("figure", {}, image, element("figcaption", {}, link));
      image.addEventListener("load", () => facts(pictures, took, image), { once: true });
      return figure;
    });
    $("stage").replaceChildren(element("p", { id: "stage-text" }), ...figures);
    text("stage-text", "");
  }

  async function facts(pictures, took, image) {
    const triton = pictures.reduce((sum, picture) => sum + picture.triton, 0);
    const size = pictures.reduce((sum, picture) => sum + picture.blob.size, 0);
    const rows = [
      ["Size", `${image.naturalHeight} × ${image.naturalWidth} pixels (height × width)`],
      ["Time", `${seconds(took)}, of which ${seconds(triton)} in Triton`],
      ["File", `${bytes(size)} as PNG${pictures.length > 1 ? ` in ${pictures.length} pictures` : ""}`],
      ["Latents", `(${current.shape.join(", ")}) ${current.dtype}`],
      ["Request", pictures.map((picture) => picture.id).join(", ")],
    ];
    if (pictures[0].warning) rows.splice(1, 0, ["Note", pictures[0].warning]);
    const peak = value(await metrics().catch(() => ""), "fluxvae_peak_bytes");
    if (peak) rows.splice(2, 0, ["Plan", `at most ${bytes(peak)} above the weights, as the last decode was planned`]);
    list("facts", rows);
  }

  // What the server is, and its live numbers.

  async function server() {
    const info = await (await ask("/info")).json();
    const { checkpoint, device, dtype, engine, memory_limit: limit } = info.settings;
    list("server-facts", [
      ["Checkpoint", checkpoint ?? "demo"],
      ["Device", device ?? "Triton’s choice"],
      ["Type", dtype ?? "the device’s"],
      ["Engine", engine ?? "exact"],
      ["Memory limit", limit ?? "what is free"],
      ["Largest", `${(info.limits.max_pixels / 1e6).toFixed(1)} megapixels, ${bytes(info.limits.max_request_bytes)}`],
      ["Triton", info.triton],
    ]);
    $("server").hidden = false;
    const buttons = info.examples.map((file) => {
      const button = element("button", { type: "button" }, file.replace(/_.*$/, ""));
      button.title = file;
      button.addEventListener("click", async () => {
        try {
          await take(file, await (await ask(`/examples/${file}`)).arrayBuffer());
        } catch (error) {
          tell(error.message);
        }
      });
      return button;
    });
    $("example-buttons").replaceChildren(...buttons);
    $("examples").hidden = buttons.length === 0;
  }

  const metrics = async () => (await ask("/metrics")).text();

  // Returns the sum of a metric over all its labels, or null where the page has no such metric.
  function value(page, name) {
    const lines = page.split("\n").filter((line) => line.startsWith(`${name} `) || line.startsWith(`${name}{`));
    return lines.length ? lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" ") + 1)), 0) : null;
  }

  async function refresh() {
    try {
      const page = await metrics();
      const pixels = value(page, "fluxvae_megapixels_total");
      const took = value(page, "fluxvae_decode_seconds_total");
      const peak = value(page, "fluxvae_peak_bytes");
      const tiles = [
        ["decodes", count(value(page, "fluxvae_decodes_total"))],
        ["megapixels", pixels?.toFixed(1)],
        ["megapixels a second", pixels && took ? (pixels / took).toFixed(2) : null],
        ["last plan’s peak", peak === null ? null : bytes(peak)],
        ["under way here", count(value(page, "fluxvae_gateway_in_flight"))],
        ["waiting in Triton", count(value(page, "nv_inference_pending_request_count"))],
        ["errors", count(value(page, "fluxvae_errors_total") ?? (pixels === null ? null : 0))],
      ];
      $("tiles").replaceChildren(
        ...tiles.map(([name, number]) => element("div", {}, element("dt", {}, name), element("dd", {}, number ?? "–"))),
      );
      const up = value(page, "fluxvae_gateway_triton_metrics_up") === 1;
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

  // Helpers.

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
  function busy(now) {
    $("stage").classList.toggle("busy", now);
    $("cancel").hidden = !now;
    $("decode").disabled = now;
  }

  $("file").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    event.target.value = ""; // otherwise choosing the same file again would not count as a change
    if (file) await take(file.name, await file.arrayBuffer());
  });
  for (const kind of ["dragenter", "dragover"]) {
    $("drop").addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.add("over");
    });
  }
  for (const kind of ["dragleave", "drop"]) $("drop").addEventListener(kind, () => $("drop").classList.remove("over"));
  $("drop").addEventListener("drop", async (event) => {
    event.preventDefault();
    const file = event.dataTransfer.files[0];
    if (file) await take(file.name, await file.arrayBuffer());
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    decode();
  });
  $("cancel").addEventListener("click", () => running?.abort());

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

  server().catch((error) => tell(error.message));
  ready();
  refresh();
  setInterval(() => {
    if (!document.hidden) {
      refresh();
      ready();
    }
  }, METRICS_EVERY_MS);
})();
