// transformers.js in a page: serves the page, the npm packages and the bundle, and opens it in a headless Chromium.
import fs from 'node:fs';
import http from 'node:http';
import path from 'node:path';
import { chromium } from 'playwright-core';

const folder = process.argv[2];
const { executable, calls } = JSON.parse(fs.readFileSync(0, 'utf-8'));
const pictures = calls.map((call) => call.picture);
const served = JSON.stringify(calls.map((call, index) => ({ ...call, picture: `/pictures/${index}` })));
const types = { '.html': 'text/html', '.js': 'text/javascript', '.mjs': 'text/javascript', '.wasm': 'application/wasm' };
const places = { npm: (rest) => path.join('node_modules', rest), bundle: (rest) => path.join(folder, rest) };

function file(url) {
    const [, first, ...rest] = decodeURIComponent(url).split('/');
    if (first === '') return 'page.html';
    if (first === 'pictures') return pictures[Number(rest[0])];
    return places[first]?.(rest.join('/'));
}

const server = http.createServer((request, response) => {
    const name = file(request.url);
    if (request.url === '/calls.json') return response.end(served);
    if (!name || !fs.existsSync(name)) return response.writeHead(404).end();
    // With these two headers a page gets threads.
    response.writeHead(200, {
        'content-type': types[path.extname(name)] ?? 'application/octet-stream',
        'cross-origin-opener-policy': 'same-origin',
        'cross-origin-embedder-policy': 'require-corp',
    });
    response.end(fs.readFileSync(name));
});
await new Promise((ready) => server.listen(0, '127.0.0.1', ready));
const args = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync'];
const browser = await chromium.launch({ executablePath: executable, args });
const page = await browser.newPage();
page.on('pageerror', (error) => console.error(error.message));
await page.goto(`http://127.0.0.1:${server.address().port}/`);
const answers = await page.evaluate(() => window.answers);
await browser.close();
server.close();
console.log(JSON.stringify(answers));
