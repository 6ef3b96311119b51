"use strict";
// Pictures as pixels: a file that becomes a canvas the model can take, and how far two pictures are apart.
const Picture = (() => {
  const MULTIPLE = 16; // how many pixels there are for each packed token, in each direction

  // Whether these are the bytes of a picture file: PNG, JPEG, WebP, GIF or BMP.
  function known(buffer) {
    const start = String.fromCharCode(...new Uint8Array(buffer, 0, Math.min(12, buffer.byteLength)));
    return /^(\x89PNG|\xff\xd8\xff|RIFF[^]{4}WEBP|GIF8|BM)/.test(start);
  }

  // Draws a file, upright and in sRGB, and keeps the middle in multiples of 16 pixels. Returns {canvas, pixels, notes}:
  // notes say what was changed. Throws an Error whose message can be shown.
  async function draw(buffer, most) {
    let bitmap;
    try {
      bitmap = await createImageBitmap(new Blob([buffer])); // its EXIF turns it, and its colour profile is applied
    } catch {
      throw new Error("picture: this browser cannot read it; expected a PNG, JPEG or WebP file.");
    }
    const [height, width] = [bitmap.height, bitmap.width].map((side) => side - (side % MULTIPLE));
    if (height === 0 || width === 0) {
      throw new Error(`picture: got ${by(bitmap.height, bitmap.width)}; expected at least ${by(MULTIPLE, MULTIPLE)}.`);
    }
    if (height * width > most) {
      throw new Error(
        `picture: got ${by(height, width)}, ${height * width} pixels, more than the ${most} this server takes; make ` +
          "it smaller.",
      );
    }
    const notes = [];
    if (height !== bitmap.height || width !== bitmap.width) {
      notes.push(`the middle of ${by(bitmap.height, bitmap.width)}, since sides are multiples of ${MULTIPLE}`);
    }
    const canvas = Object.assign(document.createElement("canvas"), { height, width });
    const context = canvas.getContext("2d", { colorSpace: "srgb", willReadFrequently: true });
    const left = -Math.floor((bitmap.width - width) / 2);
    const top = -Math.floor((bitmap.height - height) / 2);
    context.drawImage(bitmap, left, top);
    let pixels = context.getImageData(0, 0, width, height).data;
    if (!isOpaque(pixels)) {
      context.fillStyle = "white";
      context.globalCompositeOperation = "destination-over"; // behind what is there
      context.fillRect(0, 0, width, height);
      pixels = context.getImageData(0, 0, width, height).data;
      notes.push("its transparent parts are on white, since latents hold no transparency");
    }
    bitmap.close();
    return { canvas, pixels, notes };
  }

  function isOpaque(pixels) {
    for (let index = 3; index < pixels.length; index += 4) if (pixels[index] < 255) return false;
    return true;
  }

  // Returns a canvas as a PNG file.
  function png(canvas) {
    return new Promise((resolve, reject) => {
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("picture: the browser made no PNG of it."))));
    });
  }

  // Returns the pixels of a PNG file: red, green, blue and opacity of each.
  async function pixelsOf(blob) {
    const bitmap = await createImageBitmap(blob);
    const canvas = Object.assign(document.createElement("canvas"), { height: bitmap.height, width: bitmap.width });
    const context = canvas.getContext("2d", { colorSpace: "srgb", willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    return context.getImageData(0, 0, canvas.width, canvas.height).data;
  }

  // Returns the peak signal-to-noise ratio of two pictures of one size over all their red, green and blue values of 8
  // bits, in decibels; Infinity where they are identical.
  function psnr(one, other) {
    let squares = 0;
    for (let index = 0; index < one.length; index += 4) {
      for (let channel = 0; channel < 3; channel++) squares += (one[index + channel] - other[index + channel]) ** 2;
    }
    return 10 * Math.log10((255 ** 2 * (one.length / 4) * 3) / squares);
  }

  const by = (height, width) => `${height} × ${width} pixels (height × width)`;

  return { known, draw, png, pixelsOf, psnr, by };
})();
