//! What a user writes: the values of the options, and the configuration file with them.
#![no_main]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use fuzz::descriptors::memory_file;
use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;
use vmm::Error;
use vmm::config::{load_toml, parse_memory, parse_serial, parse_vhost_user};

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    match kind % 4 {
        0 => memory(text),
        1 => told(parse_serial(text)),
        2 => vhost_user(text),
        _ => toml(text),
    }
});

fn seeds() -> Vec<Vec<u8>> {
    [
        "\x00512M,hugepages=2M",
        "\x011",
        "\x01socket=/run/console",
        "\x02blk,socket=/s,id=disk0,transport=mmio,queues=2,queue-size=128,deadline=500,features=-event_idx",
        "\x03kernel = \"/k\"\nmemory = \"64M\"\ncpus = 2\nserial = \"null\"\nvhost-user = [\"net,socket=/n\"]\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec()
}

/// A refusal is one of usage, says what it is about, and prints.
fn told<T>(result: Result<T, Error>) {
    if let Err(error) = result {
        assert_eq!(error.fault().exit_code(), 2, "{error}");
        let mut text = Vec::new();
        error.report(&mut text).expect("memory");
        assert!(!text.is_empty());
    }
}

fn memory(text: &str) {
    told(parse_memory(text).inspect(|memory| {
        assert!(memory.size.is_multiple_of(2 << 20) && memory.size >= arch::layout::RAM_MIN);
    }));
}

fn vhost_user(text: &str) {
    // A number behind `fd=` would be a descriptor of the fuzzer's.
    if text.contains("fd=") {
        return;
    }
    told(parse_vhost_user(text).inspect(|device| {
        let order = device.order().expect("checked while it was parsed");
        let wishes = order.wishes;
        assert!(wishes.queues.is_none_or(|queues| (1..=256).contains(&queues)));
        assert!(wishes.queue_size.is_none_or(|size| size.is_power_of_two() && size <= 32768));
        assert!(order.device_type.config_size() <= 256);
        assert!(device.id.as_deref().is_none_or(|id| (1..=64).contains(&id.len())));
        assert!(device.deadline > Duration::ZERO && device.deadline <= Duration::from_secs(3600));
    }));
}

fn toml(text: &str) {
    let file = File::from(memory_file(0));
    file.write_all_at(text.as_bytes(), 0).expect("a file in memory");
    let loaded = load_toml(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())));
    if let Ok(config) = &loaded {
        config.memory.iter().for_each(|text| memory(text));
        config.serial.iter().for_each(|text| told(parse_serial(text)));
        config.vhost_user.iter().for_each(|text| vhost_user(text));
    }
    told(loaded);
}
