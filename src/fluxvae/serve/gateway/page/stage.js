"use strict";
// The stage: shows pictures, what can be saved, and what is known about them.
const Stage = (() => {
  const { $, text, seconds, bytes, element, list } = Page;
  const EMPTY = "The picture appears here.";

  let shown = []; // the object URLs on the page

  const stem = (name) => name.replace(/\.\w+$/, "");
  const save = (href, download) => element("a", { href, download, className: "button" }, `Save ${download}`);
  const inTriton = ({ took, triton }) => `${seconds(took)}, of which ${seconds(triton)} in Triton`;

  // Says what is under way: where its picture will be, or above the others. Without words, nothing is any more.
  function say(words) {
    if (words === undefined) $("awaited")?.remove();
    if ($("awaited")) text("awaited-text", words);
    else text("stage-text", words ?? (shown.length ? "" : EMPTY));
  }

  // Puts figures into the stage, in place of those before. Their URLs are of these blobs.
  function put(urls, ...figures) {
    shown.forEach((url) => URL.revokeObjectURL(url));
    shown = urls;
    $("stage").replaceChildren(element("p", { id: "stage-text", hidden: true }), ...figures);
  }

  // Shows what latents decoded to: pictures {blob, triton, warning, id}, after ms `took`.
  function decoded(latents, pictures, took) {
    const urls = pictures.map((picture) => URL.createObjectURL(picture.blob));
    const figures = pictures.map((picture, row) => {
      const name = pictures.length > 1 ? `${stem(latents.name)}-${row}.png` : `${stem(latents.name)}.png`;
      const image = element("img", { src: urls[row], alt: `The picture decoded from ${latents.name}` });
      image.addEventListener("load", () => facts(latents, pictures, took, image), { once: true });
      return element("figure", {}, image, element("figcaption", {}, save(urls[row], name)));
    });
    put(urls, ...figures);
  }

  async function facts(latents, pictures, took, image) {
    const triton = pictures.reduce((sum, picture) => sum + picture.triton, 0);
    const size = pictures.reduce((sum, picture) => sum + picture.blob.size, 0);
    const rows = [
      ["Size", Picture.by(image.naturalHeight, image.naturalWidth)],
      ["Time", inTriton({ took, triton })],
      ["File", `${bytes(size)} as PNG${pictures.length > 1 ? ` in ${pictures.length} pictures` : ""}`],
      ["Latents", `(${latents.shape.join(", ")}) ${latents.dtype}`],
      ["Request", pictures.map((picture) => picture.id).join(", ")],
    ];
    if (pictures[0].warning) rows.splice(1, 0, ["Note", pictures[0].warning]);
    const peak = await Server.decoderPeak().catch(() => null);
    if (peak) rows.splice(2, 0, ["Plan", `at most ${bytes(peak)} above the weights, as the last decode was planned`]);
    list("facts", rows);
  }

  // Shows a picture that was encoded: its latents to be saved, and beside it what they decode to, once that is there.
  // `encoded` is {file: the latents' file, shape, took, triton, id}; `decoded` is {blob, took, triton, id, psnr}, or
  // words for why it is not there, or null while it is awaited.
  function encoded(name, drawn, original, encoded, decoded) {
    const { height, width } = drawn.canvas;
    const there = decoded !== null && typeof decoded !== "string";
    const urls = [original, encoded.file, ...(there ? [decoded.blob] : [])].map((blob) => URL.createObjectURL(blob));
    const figure = (src, alt, title, link) =>
      element(
        "figure",
        {},
        element("img", { src, alt }),
        element("figcaption", {}, element("span", {}, title), link),
      );
    const figures = [figure(urls[0], `Your picture ${name}`, name, save(urls[1], `${stem(name)}.safetensors`))];
    if (there) {
      const link = save(urls[2], `${stem(name)}-decoded.png`);
      figures.push(figure(urls[2], `${name}, encoded and decoded`, "Decoded from its latents", link));
    } else if (decoded === null) {
      const blank = element("canvas", { height, width }); // it takes the place that the picture will have
      figures.push(element("figure", { id: "awaited" }, blank, element("figcaption", { id: "awaited-text" })));
    }
    put(urls, element("div", { className: "pair" }, ...figures));
    const rows = [
      ["Size", Picture.by(height, width)],
      ...drawn.notes.map((note) => ["Note", note]),
      ["Encoded", inTriton(encoded)],
      ["Latents", `(${encoded.shape.join(", ")}) float32, ${bytes(encoded.file.size)} as a file`],
    ];
    if (there) rows.push(["Decoded", inTriton(decoded)], ["PSNR", decibels(decoded.psnr)]);
    else if (decoded !== null) rows.push(["Decoded", decoded]);
    rows.push(there ? ["Requests", `${encoded.id}, ${decoded.id}`] : ["Request", encoded.id]);
    list("facts", rows);
  }

  const decibels = (psnr) =>
    psnr === Infinity
      ? "identical, to the last bit"
      : `${psnr.toFixed(2)} dB between the two, over all red, green and blue values of 8 bits`;

  return { say, decoded, encoded };
})();
