//! `flowgate::fuzz::follow` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowgate::fuzz::follow(data));
