/** How a client proves who it is, and checks who the server is. */

import { readFileSync } from "node:fs";
import { ChannelCredentials } from "@grpc/grpc-js";

/**
 * PEM files for TLS. ca: the authorities to trust, by default the system's. certificate, key: the
 * client's own, for mutual TLS; both or neither.
 */
export interface TlsFiles {
  readonly ca?: string;
  readonly certificate?: string;
  readonly key?: string;
}

export function channelCredentials(tls: boolean | TlsFiles | undefined): ChannelCredentials {
  if (!tls) {
    return ChannelCredentials.createInsecure();
  }
  const { ca, certificate, key }: TlsFiles = tls === true ? {} : tls;
  if ((certificate === undefined) !== (key === undefined)) {
    throw new TypeError("a client certificate needs its key, and a key its certificate");
  }
  return ChannelCredentials.createSsl(read(ca), read(key), read(certificate));
}

/** Throws for what no key can be, and where a key would leave this machine in plaintext, unasked. */
export function checkKey(apiKey: string, target: string, tls: boolean | TlsFiles | undefined): void {
  // A line feed, left by an editor, would make the metadata illegal.
  if (!/^[!-~]+$/.test(apiKey)) {
    throw new TypeError("the API key is empty, or has characters that no key has");
  }
  if (tls === undefined && !isLoopback(target)) {
    throw new TypeError(
      `the API key would travel to ${target} in plaintext; use tls: true, or tls: false where the ` +
        "network itself is trusted",
    );
  }
}

/** Whether `target` names this machine. */
export function isLoopback(target: string): boolean {
  if (/^unix(-abstract)?:/.test(target)) {
    return true;
  }
  const host = target.replace(/^(dns:)?\/*/, "").replace(/:\d*$/, "");
  return /^(localhost|\[::1\]|127\.\d+\.\d+\.\d+)$/.test(host);
}

function read(file: string | undefined): Buffer | null {
  return file === undefined ? null : readFileSync(file);
}
