//! `flowgate::fuzz::classify` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowgate::fuzz::classify(data));
