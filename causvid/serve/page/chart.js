// Stacked bars: seconds per block in text, transformer, cache and codec.

const PARTS = ["text", "transformer", "cache", "codec"];
const MOST = 60;

export class Chart {
  constructor(canvas, facts) {
    this.canvas = canvas;
    this.facts = facts;
    this.clear();
  }

  clear() {
    this.rows = [];
    this.facts.replaceChildren();
    this.draw();
  }

  add(row, summary, cacheBytes) {
    this.rows.push(row);
    if (this.rows.length > MOST) this.rows.shift();
    this.tell({
      "first frame": `${(1000 * summary.first_frame_s).toFixed(0)} ms`,
      "block": `${(1000 * summary.block_s).toFixed(0)} ms, jitter ${(1000 * summary.jitter_s).toFixed(0)} ms`,
      "speed": `${summary.fps.toFixed(1)} fps`,
      "cache": cacheBytes < 1e6 ? `${(cacheBytes / 1e3).toFixed(0)} kB` : `${(cacheBytes / 1e6).toFixed(1)} MB`,
      "blocks made": `${summary.blocks}`,
    });
    this.draw();
  }

  tell(facts) {
    this.facts.replaceChildren(...Object.entries(facts).flatMap(([name, value]) => {
      const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
      dt.textContent = name;
      dd.textContent = value;
      return [dt, dd];
    }));
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const g = this.canvas.getContext("2d");
    g.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const top = Math.max(0.001, ...this.rows.map((row) => PARTS.reduce((sum, part) => sum + row[part], 0)));
    g.fillStyle = style.getPropertyValue("--soft");
    g.font = "11px system-ui, sans-serif";
    g.fillText(this.rows.length ? `${(1000 * top).toFixed(0)} ms` : "no block yet", 0, 10);
    const [step, room] = [width / MOST, height - 16];
    this.rows.forEach((row, index) => {
      let y = height;
      for (const part of PARTS) {
        const size = (row[part] / top) * room;
        g.fillStyle = style.getPropertyValue(`--${part}`);
        g.fillRect(index * step, y - size, Math.max(1, step - 1), size);
        y -= size;
      }
    });
  }
}
