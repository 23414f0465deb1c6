use super::*;
use crate::virtio::types::model::{ConfigSource, ModelError, Offer, Wishes};

const V1: u64 = 1 << 32;

fn offer(features: u64, queue_num: Option<u16>, config: Option<usize>) -> Offer {
    let config = config.map(|size| vec![0xee; size]);
    Offer { features: DeviceFeatures::from_bits(features), queue_num, config }
}

fn named(name: &str) -> DeviceType {
    DeviceType::named(name).unwrap()
}

#[test]
fn names_and_ids_are_unique_and_sizes_can_be_asked_for() {
    for row in TYPES {
        assert_eq!(TYPES.iter().filter(|other| other.name == row.name || other.id == row.id).count(), 1);
        assert!(row.config_size <= MAX_CONFIG_SIZE && (1..=MAX_QUEUES).contains(&row.queues));
        for feature in row.features {
            let same = |f: &&Feature| f.bit == feature.bit || f.name == feature.name;
            assert_eq!(row.features.iter().filter(same).count(), 1, "{} {}", row.name, feature.name);
        }
    }
    assert_eq!(DeviceType::named("floppy"), None);
    assert_eq!(SCSI_CONFIG.len(), 36);
}

#[test]
fn disk_shows_the_queues_it_has_whatever_the_backend_wrote() {
    let wishes = Wishes { queues: Some(4), ..Wishes::default() };
    let model = named("blk").model(offer(V1 | 1 << 12, Some(8), Some(60)), &wishes).unwrap();
    assert_eq!((model.queues, model.queue_size), (4, 256));
    assert_eq!(model.config[34..36], [4, 0]);
    let single = named("blk").model(offer(V1, Some(8), Some(60)), &wishes).unwrap();
    assert_eq!(single.config[34..36], [0xee, 0xee], "without the feature there is no field");
}

#[test]
fn queues_are_limited_by_the_backend_but_not_below_what_the_driver_needs() {
    let wishes = Wishes { queues: Some(16), ..Wishes::default() };
    assert_eq!(named("blk").model(offer(V1, Some(2), Some(60)), &wishes).unwrap().queues, 2);
    let error = named("vsock").model(offer(V1, Some(2), Some(8)), &Wishes::default()).unwrap_err();
    assert_eq!(error, ModelError::TooFewQueues { kind: "vsock", has: 2, needs: 3 });
    let pairs = named("net").model(offer(V1, Some(1), None), &Wishes::default()).unwrap();
    assert_eq!(pairs.queues, 2);
    let one = Wishes { queues: Some(1), ..Wishes::default() };
    assert_eq!(named("input").model(offer(V1, Some(1), Some(136)), &one).unwrap().queues, 1);
}

#[test]
fn a_queue_that_a_feature_brings_is_not_there_without_it() {
    for (kind, config) in [("gpio", Some(8)), ("rtc", None), ("scmi", None)] {
        let queues = |features, served| {
            let model = named(kind).model(offer(V1 | features, served, config), &Wishes::default());
            model.map(|model| model.queues)
        };
        assert_eq!((queues(1, Some(2)), queues(1, None)), (Ok(2), Ok(2)), "{kind}");
        assert_eq!(queues(1, Some(1)), Err(ModelError::TooFewQueues { kind, has: 1, needs: 2 }));
        assert_eq!(
            (queues(0, Some(1)), queues(0, Some(2)), queues(0, None)),
            (Ok(1), Ok(1), Ok(1)),
            "{kind}"
        );
    }
    let without = named("gpio").wanted("-irq").unwrap();
    assert_eq!(without.device().bits() & 1, 0, "by its name");
}

#[test]
fn buses_and_cameras_have_the_queues_and_the_configuration_of_their_specification() {
    for (name, id, queues, config) in
        [("rtc", 17, 2, 0), ("i2c", 34, 1, 0), ("gpio", 41, 2, 8), ("spi", 45, 1, 32), ("media", 48, 2, 40)]
    {
        let row = named(name);
        assert_eq!((row.id(), row.queues, row.config_size()), (id, queues, config), "{name}");
    }
}

#[test]
fn features_without_their_configuration_fields_are_hidden() {
    let all = V1 | 1 << 9 | 1 << 14 | 1 << 16 | 1 << 17;
    let full = named("blk").model(offer(all, None, Some(60)), &Wishes::default()).unwrap();
    assert_eq!(full.features.bits(), V1 | 1 << 9 | 1 << 14);
    let short = named("blk").model(offer(all, None, Some(36)), &Wishes::default()).unwrap();
    assert_eq!(short.features.bits(), V1 | 1 << 9);
    assert_eq!(short.config.len(), 60);
    let bare = named("net").model(offer(V1 | 1 << 5 | 1 << 16 | 1 << 15, None, None), &Wishes::default());
    let bare = bare.unwrap();
    assert_eq!(bare.features.bits(), V1 | 1 << 15);
    assert_eq!((bare.config_source, bare.config), (ConfigSource::Fixed, vec![0; 24]));
}

#[test]
fn backend_without_configuration_or_version_1_is_refused_in_words() {
    let no_config = named("blk").model(offer(V1, None, None), &Wishes::default()).unwrap_err();
    assert_eq!(
        no_config.to_string(),
        "the backend has no configuration space (protocol feature CONFIG), a blk device needs one"
    );
    let legacy = named("blk").model(offer(1, None, Some(60)), &Wishes::default()).unwrap_err();
    assert_eq!(legacy, ModelError::Legacy);
}

#[test]
fn scsi_without_configuration_gets_one_that_drivers_accept() {
    let wishes = Wishes { queues: Some(6), ..Wishes::default() };
    let model = named("scsi").model(offer(V1, None, None), &wishes).unwrap();
    assert_eq!((model.config[0], model.config[20], model.config[24]), (4, 96, 32));
    assert_eq!(model.queue_size, 128);
}

#[test]
fn file_system_has_the_tag_of_the_user_before_that_of_the_backend() {
    let tagged = named("fs").with_tag("work").unwrap();
    assert!(!tagged.needs_config() && named("fs").needs_config());
    for config in [None, Some(40)] {
        let model = tagged.model(offer(V1, None, config), &Wishes::default()).unwrap();
        assert_eq!(model.config.get(..6).unwrap(), b"work\0\0");
        // One request queue and the queue for urgent requests.
        assert_eq!(model.config.get(36..40).unwrap(), 1_u32.to_le_bytes());
    }
    assert!(named("fs").with_tag(&"x".repeat(36)).is_ok());
    for (kind, tag) in [("fs", ""), ("fs", &*"x".repeat(37)), ("blk", "work")] {
        assert!(named(kind).with_tag(tag).is_err(), "{kind} {tag}");
    }
}

#[test]
fn scsi_settings_that_change_nothing_are_known_to_the_backend() {
    let (scsi, blk) = (named("scsi"), named("blk"));
    assert!(scsi.is_settled(SCSI_CONFIG, 24, &32_u32.to_le_bytes()));
    assert!(!scsi.is_settled(SCSI_CONFIG, 24, &16_u32.to_le_bytes()));
    assert!(!scsi.is_settled(SCSI_CONFIG, 34, &32_u32.to_le_bytes()) && !scsi.is_settled(&[], 24, &[0]));
    assert!(!blk.is_settled(&[1; 60], 32, &[1]), "the backend judges itself");
}

#[test]
fn gpu_has_a_screen_when_its_backend_leaves_that_to_us() {
    let mut config = [0; 16];
    named("gpu").patch(&mut config, DeviceFeatures::from_bits(V1), 2);
    assert_eq!(config[8..12], [1, 0, 0, 0]);
    config[8] = 3;
    named("gpu").patch(&mut config, DeviceFeatures::from_bits(V1), 2);
    assert_eq!(config[8..12], [3, 0, 0, 0]);
    named("gpu").patch(&mut config[..9], DeviceFeatures::from_bits(V1), 2);
}

#[test]
fn window_is_told_whole_and_keeps_what_the_driver_wrote() {
    let input = named("input");
    assert_eq!(input.whole_after(&[0x11, 1, 8, 7], 1, &[3]), Some(vec![0x11, 3, 8, 7]));
    assert_eq!(input.whole_after(&[0x11, 1], 1, &[3, 4]), None);
    let mut shown = [0, 0, 5, 6];
    input.keep_written(&[0x11, 3, 8, 7], &mut shown);
    assert_eq!(shown, [0x11, 3, 5, 6]);
    let blk = named("blk");
    assert_eq!(blk.whole_after(&[1; 60], 32, &[0]), None);
    blk.keep_written(&[1; 60], &mut shown);
    assert_eq!(shown, [0x11, 3, 5, 6]);
}

#[test]
fn console_with_ports_has_queues_for_all_of_them_or_no_ports() {
    let multiport = 1 << 1;
    let model = |ports: u32, served: u16, wanted: Option<u16>| {
        let mut config = vec![0; 12];
        config[4..8].copy_from_slice(&ports.to_le_bytes());
        let offer = Offer {
            features: DeviceFeatures::from_bits(V1 | multiport),
            queue_num: Some(served),
            config: Some(config),
        };
        let model = named("console").model(offer, &Wishes { queues: wanted, ..Wishes::default() }).unwrap();
        (model.queues, model.features.has(1))
    };
    assert_eq!(model(1, 4, None), (4, true));
    assert_eq!(model(3, 16, None), (8, true));
    assert_eq!(model(1, 2, None), (2, false));
    assert_eq!(model(1, 4, Some(2)), (2, false));
    assert_eq!(model(u32::MAX, 4, None), (4, false), "a count that nobody can serve");
}

#[test]
fn generic_device_is_what_the_user_says() {
    let wishes = Wishes { queues: Some(5), queue_size: Some(1024) };
    let generic = "generic:48".parse::<DeviceType>().unwrap().with_config_size(7).unwrap();
    assert_eq!((generic.id(), generic.config_size()), (48, 7));
    let model = generic.model(offer(V1, Some(9), Some(7)), &wishes).unwrap();
    assert_eq!((model.queues, model.queue_size, model.config.len()), (5, 1024, 7));
}

#[test]
fn wishes_out_of_range_are_refused() {
    let check = |wishes: Wishes| wishes.validate().unwrap_err();
    let wishes = Wishes::default();
    for n in [0, 257] {
        assert_eq!(check(Wishes { queues: Some(n), ..wishes }), ModelError::Queues(n));
    }
    for n in [0, 3, 1000, 65535] {
        assert_eq!(check(Wishes { queue_size: Some(n), ..wishes }), ModelError::QueueSize(n));
    }
    assert_eq!(named("blk").with_config_size(257), Err(TypeError::ConfigSize(257)));
    assert!(Wishes { queue_size: Some(32768), ..wishes }.validate().is_ok());
}

#[test]
fn features_change_by_the_names_of_the_type_and_of_the_transport() {
    let blk = named("blk").wanted("-flush-event_idx+ro").unwrap();
    assert!(!blk.device().has(9) && !blk.device().has(29) && blk.device().has(5));
    let net = named("net");
    assert!(!net.wanted("").unwrap().device().has(17));
    let asks = |kind: &str, changes: &str| {
        named(kind).wanted(changes).unwrap().protocol().contains(ProtocolFeatures::CONFIG)
    };
    assert!(asks("blk", "") && !asks("crypto", "") && asks("crypto", "+config"), "a crypto device's is ours");
    assert!(net.wanted("+ctrl_vq").unwrap().device().has(17));
    let event_idx = |kind: &str, changes: &str| named(kind).wanted(changes).unwrap().device().has(29);
    assert!(event_idx("blk", "") && !event_idx("sound", "") && event_idx("sound", "+event_idx"));
    assert_eq!(named("blk").wanted("-wings").unwrap_err().0, "wings");
    assert!(named("blk").wanted("flush").is_err());
}

#[test]
fn types_are_parsed_by_name_or_number() {
    assert_eq!("blk".parse(), Ok(named("blk")));
    assert_eq!("generic:2".parse::<DeviceType>().unwrap().id(), 2);
    assert_eq!("disk".parse::<DeviceType>(), Err(TypeError::Unknown("disk".into())));
    for id in ["0", "", "-1", "65536", "x"] {
        assert_eq!(format!("generic:{id}").parse::<DeviceType>(), Err(TypeError::Id(id.into())));
    }
}

#[test]
fn only_the_fields_of_the_driver_are_writable() {
    let may = |kind: &str, features: u64| {
        let row = kind.parse::<DeviceType>().unwrap();
        let features = DeviceFeatures::from_bits(V1 | features);
        let widths =
            |at| [1, 2, 4, 8].into_iter().filter(move |width| row.driver_may_write(features, at, *width));
        (0..64).flat_map(|at| widths(at).map(move |width| (at, width))).collect::<Vec<(usize, usize)>>()
    };
    let dword =
        |at| vec![(at, 1), (at, 2), (at, 4), (at + 1, 1), (at + 1, 2), (at + 2, 1), (at + 2, 2), (at + 3, 1)];
    assert_eq!(may("blk", 1 << 11), [(32, 1)]);
    assert_eq!(may("blk", 0), [], "without CONFIG_WCE there is no such field");
    assert_eq!(may("console", 1 << 2), dword(8));
    assert_eq!(may("console", 0), []);
    assert_eq!(may("scsi", 0), [dword(20), dword(24)].concat());
    assert_eq!(may("gpu", 0), dword(4));
    assert_eq!(may("input", 0), [(0, 1), (1, 1)]);
    for kind in ["net", "rng", "vsock", "fs", "crypto", "sound", "gpio", "can", "spi", "media"] {
        assert_eq!(may(kind, u64::MAX), [], "{kind}");
    }
    assert_eq!(may("generic:48", 0).len(), 64 * 4);
    let row = named("blk");
    assert!(!row.driver_may_write(DeviceFeatures::from_bits(u64::MAX), usize::MAX, 8));
}
