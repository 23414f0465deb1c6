//! `features=`: the names that a user writes, on their own and for each device type.
#![no_main]

use devices::virtio::types::table::DeviceType;
use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;
use transport::vhost_user::{DeviceFeatures, ProtocolFeatures, Wanted};

fuzz_target!(init: offer(&seeds()), |text: &str| {
    let plain = Wanted::default().adjust(text);
    if let Ok(wanted) = &plain {
        // What prints can be read again.
        let device = names(wanted.device().to_string());
        let again = Wanted::default().adjust(&all_off()).and_then(|off| off.adjust(&device));
        assert_eq!(again.expect("names that were printed").device(), wanted.device(), "{device}");
        let offered = ProtocolFeatures::from_bits(u64::MAX);
        let agreed = ProtocolFeatures::negotiate(wanted.protocol(), offered);
        assert!(wanted.protocol().contains(agreed));
        assert_eq!(ProtocolFeatures::negotiate(agreed, offered), agreed, "agreed once, agreed for ever");
    }
    for name in ["blk", "net", "fs"] {
        let kind = DeviceType::named(name).expect("a type");
        if plain.is_ok() {
            kind.wanted(text).expect("the names that all types have");
        }
        let _ = kind.wanted(text);
    }
    let _ = text.parse::<DeviceType>();
});

fn seeds() -> Vec<Vec<u8>> {
    ["-event_idx+mq", "+access_platform-bit5+pbit20", "-protocol_features", "generic:42", "vhost_user_fs"]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

/// `-bit0-bit1…`, but for the bit that is not a feature of the device.
fn all_off() -> String {
    (0..64).filter(|n| *n != 30).map(|n| format!("-bit{n}")).collect()
}

/// The printed names with a sign before each.
fn names(printed: String) -> String {
    let own = DeviceFeatures::from_bits(1 << 30).to_string();
    let names = printed.split(' ').filter(|name| *name != "none" && *name != own);
    names.map(|name| format!("+{name}")).collect()
}
