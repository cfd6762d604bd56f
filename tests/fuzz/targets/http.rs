//! `flowgate::fuzz::http` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowgate::fuzz::http(data));
