//! `flowgate::fuzz::proxy_headers` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowgate::fuzz::proxy_headers(data));
