"use strict";
// The page: takes a latents file, an example or a picture, has the server decode or encode it, and shows what comes out.
(() => {
  const { $, ask, told, seconds, element, tell } = Page;

  let current = null; // what was taken last: latents {name, bytes, shape, dtype, height, width}, or a picture {name, drawn}
  let running = null; // the AbortController of the work under way

  // Taking what is dropped or chosen.

  async function take(name, buffer, type = "") {
    running?.abort(); // whatever was under way is of no interest any more
    running = null;
    busy(false);
    current = null; // nor is what was taken before, while this is being read
    $("form").hidden = true;
    Stage.say();
    tell(null);
    const picture = type.startsWith("image/") || Picture.known(buffer);
    await (picture ? takePicture(name, buffer) : takeLatents(name, buffer));
  }

  // Reads latents. Decodes them at once if their size is known, and otherwise asks for the size.
  async function takeLatents(name, buffer) {
    let read;
    try {
      read = Safetensors.latents(buffer);
    } catch (error) {
      return refuse(name, error);
    }
    current = { name, ...read };
    $("start").textContent = "Decode";
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
    else await work();
  }

  async function takePicture(name, buffer) {
    const mine = (current = { name });
    try {
      const info = await Server.info();
      if (!encoderOf(info)) throw new Error(howToEncode(info));
      mine.drawn = await Picture.draw(buffer, info.limits.max_pixels);
    } catch (error) {
      if (current === mine) refuse(name, error);
      return;
    }
    if (current !== mine) return; // another file was taken meanwhile
    const { canvas } = mine.drawn;
    $("start").textContent = "Encode";
    $("file-name").textContent = name;
    $("file-facts").textContent = Picture.by(canvas.height, canvas.width);
    $("form").hidden = false;
    $("size").hidden = $("size-note").hidden = true;
    for (const side of ["height", "width"]) $(side).required = false;
    await work();
  }

  function refuse(name, error) {
    $("form").hidden = true;
    $("file-name").textContent = name;
    $("file-facts").textContent = "cannot be taken";
    tell(error.message);
  }

  const encoderOf = (info) => Object.values(info.models).find((model) => model.encodes);

  // Returns the model that decodes what this one encodes to, if it is served.
  const decoderFor = (info, encoder) =>
    Object.values(info.models).find((model) => !model.encodes && model.vae_class === encoder.vae_class);

  function howToEncode(info) {
    const name = info.encoder ?? "vae_encoder"; // null where the model makes previews
    const checkpoint = info.approximate ? "CHECKPOINT" : (info.settings.checkpoint ?? "demo");
    return (
      "This server encodes no pictures. Start it with a model that does: " +
      `fluxvae serve --model ${info.model}=${info.settings.checkpoint ?? "demo"} --model ${name}=${checkpoint}`
    );
  }

  // Working: decoding latents, or encoding a picture and decoding it again.

  async function work() {
    running?.abort();
    const mine = (running = new AbortController());
    let start = performance.now();
    let doing = "Decoding";
    const say = () => Stage.say(`${doing} … ${seconds(performance.now() - start)}`);
    tell(null);
    busy(true);
    const clock = setInterval(say, 100);
    const begin = (what) => {
      [doing, start] = [what, performance.now()];
      say();
    };
    try {
      if (current.drawn) await encode(mine.signal, begin);
      else await decode(mine.signal, start);
    } catch (error) {
      if (error.name !== "AbortError") tell(error.message);
      if (running === mine) Stage.say();
    } finally {
      clearInterval(clock);
      if (running === mine) {
        running = null;
        busy(false);
      }
      Server.refresh();
    }
  }

  async function decode(signal, start) {
    const latents = current;
    const pictures = [];
    const side = (name) => ($("size").hidden ? latents[name] : Number($(name).value));
    const size = { height: side("height"), width: side("width") };
    const layout = Safetensors.layout(latents.shape, size.height, size.width);
    for (let row = 0; row < layout.count; row++) pictures.push(await one(latents, row, layout, size, signal));
    Stage.decoded(latents, pictures, performance.now() - start);
  }

  // Decodes one image of the batch. The images go one by one because an encoded answer holds a single picture.
  async function one({ bytes, dtype }, row, layout, size, signal) {
    const stride = bytes.length / layout.count;
    const query = new URLSearchParams({ dtype, output_type: "pil", image_format: "png", do_scaling: "True" });
    for (const dimension of layout.each) query.append("shape", dimension);
    // Packed latents need the size, and so do three dimensions, which can be read in two ways. Other shapes tell it.
    if (layout.packed || layout.each.length === 3) {
      for (const [name, value] of Object.entries(size)) if (value !== null) query.set(name, value);
    }
    return fetchPicture("/decode", query, bytes.slice(row * stride, (row + 1) * stride), signal);
  }

  // Sends latents to be decoded. Returns {blob: the picture as PNG, and what `told` tells}.
  async function fetchPicture(path, query, latents, signal) {
    const response = await ask(`${path}?${query}`, {
      method: "POST",
      headers: { "Content-Type": "tensor/binary", Accept: "image/png" },
      body: latents,
      signal,
    });
    return { blob: await response.blob(), ...told(response) };
  }

  async function encode(signal, begin) {
    const { name, drawn } = current;
    const info = await Server.info();
    const encoder = encoderOf(info);
    const decoder = decoderFor(info, encoder);
    begin("Encoding");
    let start = performance.now();
    const original = await Picture.png(drawn.canvas);
    const response = await ask(`${encoder.path}?do_scaling=True`, {
      method: "POST",
      headers: { "Content-Type": "image/png" },
      body: original,
      signal,
    });
    const shape = JSON.parse(response.headers.get("shape"));
    const latents = new Uint8Array(await response.arrayBuffer());
    const { height, width } = drawn.canvas;
    const file = Safetensors.file(latents, shape, height, width);
    const encoded = { file, shape, took: performance.now() - start, ...told(response) };
    if (!decoder) {
      Stage.encoded(name, drawn, original, encoded, "not here: no model that decodes such latents is served");
      return;
    }
    Stage.encoded(name, drawn, original, encoded, null);
    begin("Decoding");
    start = performance.now();
    const query = new URLSearchParams({ dtype: "float32", output_type: "pil", image_format: "png", do_scaling: "True" });
    for (const dimension of shape) query.append("shape", dimension);
    const decoded = await fetchPicture(decoder.path, query, latents, signal);
    const took = performance.now() - start;
    const psnr = Picture.psnr(drawn.pixels, await Picture.pixelsOf(decoded.blob));
    signal.throwIfAborted();
    Stage.encoded(name, drawn, original, encoded, { took, psnr, ...decoded });
  }

  function busy(now) {
    $("stage").classList.toggle("busy", now);
    $("cancel").hidden = !now;
    $("start").disabled = now;
  }

  $("file").addEventListener("change", async (event) => {
    const file = event.target.files[0];
    event.target.value = ""; // otherwise choosing the same file again would not count as a change
    if (file) await take(file.name, await file.arrayBuffer(), file.type);
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
    if (file) await take(file.name, await file.arrayBuffer(), file.type);
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    work();
  });
  $("cancel").addEventListener("click", () => running?.abort());

  // Examples are latents, so that they are offered where a model decodes.
  function offer(info) {
    const buttons = (info.encodes ? [] : info.examples).map((file) => {
      const button = element("button", { type: "button", title: file }, file.replace(/_.*$/, ""));
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

  Server.info().then(offer).catch(() => {}); // Server has told the error
})();
