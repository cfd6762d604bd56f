//! `flowgate::fuzz::startup_packets` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| flowgate::fuzz::startup_packets(data));
