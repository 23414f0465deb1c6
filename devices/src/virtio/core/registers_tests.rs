use super::*;

const OFFERED: u64 = 1 << 32 | 1 << 34 | 1 << 29 | 1 << 9;

fn registers() -> Registers {
    Registers::new(Identity {
        device_id: 2,
        vendor_id: 0x1234,
        features: DeviceFeatures::from_bits(OFFERED),
        queues: 2,
        queue_size: 256,
        config: (1..=60).collect(),
        shared_memory: vec![
            None,
            Some(SharedMemory { base: GuestAddr(0x12_3456_7000), length: 0x2_0000_1000 }),
        ],
    })
}

fn write(registers: &mut Registers, reg: Reg, value: u32) {
    assert_eq!(registers.write(reg, value), Effect::None, "{reg:?} = {value:#x}");
}

fn take_features(registers: &mut Registers, features: u64) {
    for (select, half) in [(0, Half::Low), (1, Half::High)] {
        write(registers, Reg::DriverFeaturesSel, select);
        write(registers, Reg::DriverFeatures, half_of(features, half));
    }
}

/// A device whose driver is at `status`.
fn registers_at(status: u32) -> Registers {
    let mut registers = registers();
    take_features(&mut registers, 1 << 32);
    for step in [0x1, 0x3, 0xb, 0xf].into_iter().take_while(|step| *step <= status) {
        let expected = if step == 0xf { Effect::Activate } else { Effect::None };
        assert_eq!(registers.write(Reg::Status, step), expected);
    }
    assert_eq!(registers.read(Reg::Status), status);
    registers
}

#[test]
fn drivers_path_activates_at_driver_ok_only() {
    assert_eq!(registers_at(0xf).accepted().unwrap().bits(), 1 << 32);
}

#[test]
fn illegal_status_changes_nothing() {
    for (status, written) in
        [(0x0, 0x2), (0x1, 0x9), (0x3, 0x7), (0x3, 0x1), (0xb, 0x7), (0xf, 0xb), (0xf, 0x10f), (0x1, 0x80)]
    {
        let mut registers = registers_at(status);
        assert_eq!(registers.write(Reg::Status, written), Effect::Refused(Refusal::IllegalStatus));
        assert_eq!(registers.read(Reg::Status), status, "{status:#x} -> {written:#x}");
    }
}

#[test]
fn several_status_bits_in_one_write_are_steps_in_order() {
    let mut registers = registers();
    assert_eq!(registers.write(Reg::Status, 0x3), Effect::None);
    assert_eq!(registers.read(Reg::Status), 0x3);
    // Features without VERSION_1: the write takes the steps up to DRIVER, and no further.
    registers.reset();
    assert_eq!(registers.write(Reg::Status, 0xf), Effect::Refused(Refusal::UnacceptableFeatures));
    assert_eq!(registers.read(Reg::Status), 0x3);
    take_features(&mut registers, 1 << 32);
    assert_eq!(registers.write(Reg::Status, 0xf), Effect::Activate);
    assert_eq!(registers.read(Reg::Status), 0xf);
}

#[test]
fn features_are_read_by_halves_and_nothing_lies_beyond() {
    let mut registers = registers();
    for (select, expected) in [(0, 1 << 29 | 1 << 9), (1, 0b101), (2, 0), (u32::MAX, 0)] {
        write(&mut registers, Reg::DeviceFeaturesSel, select);
        assert_eq!(registers.read(Reg::DeviceFeatures), expected, "select {select}");
    }
}

#[test]
fn features_that_the_core_cannot_carry_are_not_offered() {
    let mut identity = Identity {
        device_id: 1,
        vendor_id: 0,
        features: DeviceFeatures::from_bits(u64::MAX),
        queues: 1,
        queue_size: 1,
        config: vec![],
        shared_memory: vec![],
    };
    let missing = !Registers::new(identity.clone()).offered().bits();
    assert_eq!(missing, [26, 30, 37, 38, 39, 40, 41].iter().fold(0, |bits, n| bits | 1 << n));
    identity.features = DeviceFeatures::from_bits(0);
    assert_eq!(Registers::new(identity).offered().bits(), 0);
}

#[test]
fn features_ok_stays_clear_for_features_not_offered_or_without_version_1() {
    for features in [1 << 32 | 1 << 5, 1 << 9, 0, u64::MAX] {
        let mut registers = registers_at(0x3);
        take_features(&mut registers, features);
        let effect = registers.write(Reg::Status, 0xb);
        assert_eq!(effect, Effect::Refused(Refusal::UnacceptableFeatures), "{features:#x}");
        assert_eq!(registers.read(Reg::Status), 0x3);
        assert!(registers.accepted().is_none());
    }
}

#[test]
fn feature_bits_above_63_are_refused_unless_zero() {
    let mut registers = registers_at(0x3);
    write(&mut registers, Reg::DriverFeaturesSel, 2);
    write(&mut registers, Reg::DriverFeatures, 0);
    let mut beyond = registers.clone();
    write(&mut beyond, Reg::DriverFeatures, 1);
    assert_eq!(beyond.write(Reg::Status, 0xb), Effect::Refused(Refusal::UnacceptableFeatures));
    write(&mut registers, Reg::Status, 0xb);
}

#[test]
fn features_are_locked_once_agreed() {
    let mut registers = registers_at(0xb);
    assert_eq!(registers.write(Reg::DriverFeatures, 0), Effect::Refused(Refusal::FeaturesLocked));
    assert_eq!(registers.accepted().unwrap().bits(), 1 << 32);
}

#[test]
fn packed_layout_follows_the_feature() {
    let mut registers = registers_at(0x3);
    take_features(&mut registers, 1 << 32 | 1 << 34);
    write(&mut registers, Reg::Status, 0xb);
    assert_eq!(registers.ring_layout(), RingLayout::Packed);
    assert_eq!(registers_at(0xb).ring_layout(), RingLayout::Split);
}

#[test]
fn queue_registers_keep_what_is_written_by_queue_and_half() {
    let mut registers = registers_at(0xb);
    write(&mut registers, Reg::QueueSel, 1);
    for (reg, value) in [
        (Reg::QueueSize, 64),
        (Reg::QueueDesc(Half::Low), 0x1000),
        (Reg::QueueDesc(Half::High), 0x1),
        (Reg::QueueDriver(Half::High), 0x2),
        (Reg::QueueDriver(Half::Low), 0x2000),
        (Reg::QueueDevice(Half::Low), 0x3000),
        (Reg::QueueReady, 1),
    ] {
        write(&mut registers, reg, value);
    }
    assert_eq!(
        registers.queues()[1],
        QueueState {
            max_size: 256,
            size: 64,
            ready: true,
            desc: GuestAddr(0x1_0000_1000),
            driver: GuestAddr(0x2_0000_2000),
            device: GuestAddr(0x3000),
        }
    );
    assert_eq!(registers.queues()[0], QueueState::new(256));
    assert_eq!(registers.read(Reg::QueueReady), 1);
    write(&mut registers, Reg::QueueSel, 0);
    assert_eq!(registers.read(Reg::QueueReady), 0);
}

#[test]
fn queue_beyond_the_last_reads_zero_and_takes_nothing() {
    let mut registers = registers_at(0xb);
    for select in [2, 0x1_0000, u32::MAX] {
        write(&mut registers, Reg::QueueSel, select);
        assert_eq!(registers.read(Reg::QueueSizeMax), 0);
        assert_eq!(registers.read(Reg::QueueReady), 0);
        for reg in [Reg::QueueSize, Reg::QueueReady, Reg::QueueDesc(Half::Low)] {
            assert_eq!(registers.write(reg, 1), Effect::Refused(Refusal::NoSuchQueue));
        }
    }
}

#[test]
fn queue_is_locked_before_features_ok_after_driver_ok_and_while_enabled() {
    let locked = Effect::Refused(Refusal::QueueLocked);
    for status in [0x0, 0x1, 0x3, 0xf] {
        let mut registers = registers_at(status);
        assert_eq!(registers.write(Reg::QueueSize, 8), locked, "{status:#x}");
        assert_eq!(registers.write(Reg::QueueReady, 1), locked, "{status:#x}");
        assert_eq!(registers.write(Reg::QueueReady, 0), Effect::None, "{status:#x}");
        assert_eq!(registers.queues()[0], QueueState::new(256));
    }
    let mut registers = registers_at(0xb);
    write(&mut registers, Reg::QueueReady, 1);
    assert_eq!(registers.write(Reg::QueueDesc(Half::Low), 0x1000), locked);
    write(&mut registers, Reg::QueueReady, 0);
    write(&mut registers, Reg::QueueDesc(Half::Low), 0x1000);
}

#[test]
fn queue_size_that_does_not_fit_becomes_invalid_rather_than_cut() {
    let mut registers = registers_at(0xb);
    write(&mut registers, Reg::QueueSize, 0x1_0040);
    assert_eq!(registers.queues()[0].size, 0);
}

#[test]
fn notify_names_an_existing_queue_or_is_refused() {
    let mut registers = registers_at(0xf);
    assert_eq!(registers.write(Reg::QueueNotify, 1), Effect::Notify(1));
    for value in [2, 0x1_0000, 0x1_0001] {
        assert_eq!(registers.write(Reg::QueueNotify, value), Effect::Refused(Refusal::NoSuchQueue));
    }
}

#[test]
fn shared_memory_is_selected_and_missing_regions_read_all_ones() {
    let mut registers = registers();
    for (select, length, base) in [
        (0, u64::MAX, u64::MAX),
        (1, 0x2_0000_1000, 0x12_3456_7000),
        (2, u64::MAX, u64::MAX),
        (u32::MAX, u64::MAX, u64::MAX),
    ] {
        write(&mut registers, Reg::ShmSel, select);
        for half in [Half::Low, Half::High] {
            assert_eq!(registers.read(Reg::ShmLen(half)), half_of(length, half));
            assert_eq!(registers.read(Reg::ShmBase(half)), half_of(base, half));
        }
    }
}

#[test]
fn config_interrupt_waits_for_driver_ok_and_goes_with_its_acknowledgement() {
    assert!(!registers_at(0xb).note_config_interrupt());
    let mut registers = registers_at(0xf);
    assert_eq!(registers.read(Reg::InterruptStatus), 1);
    assert!(registers.note_config_interrupt());
    assert_eq!(registers.read(Reg::InterruptStatus), 3);
    write(&mut registers, Reg::InterruptAck, 1);
    assert_eq!(registers.read(Reg::InterruptStatus), 3);
    assert_eq!(registers.write(Reg::InterruptAck, 3), Effect::AckConfig);
    assert_eq!(registers.read(Reg::InterruptStatus), 1);
}

#[test]
fn config_changes_move_the_generation_twice_and_keep_the_size() {
    let mut registers = registers();
    registers.begin_config_change();
    assert_eq!(registers.read(Reg::ConfigGeneration), 1);
    registers.end_config_change(&[9; 100]);
    assert_eq!(registers.read(Reg::ConfigGeneration), 2);
    assert_eq!(registers.config(), [9; 60]);
    registers.begin_config_change();
    registers.end_config_change(&[7]);
    assert_eq!((registers.config()[0], registers.config()[1]), (7, 9));
}

#[test]
fn config_is_read_by_bytes_and_words_and_zero_beyond_its_end() {
    let registers = registers();
    let mut byte = [0xff; 1];
    registers.read_config(33, &mut byte);
    assert_eq!(byte, [34]);
    let mut word = [0xff; 8];
    registers.read_config(56, &mut word);
    assert_eq!(word, [57, 58, 59, 60, 0, 0, 0, 0]);
    registers.read_config(usize::MAX, &mut word);
    assert_eq!(word, [0; 8]);
}

#[test]
fn config_writes_inside_are_for_the_backend_and_others_refused() {
    let mut registers = registers();
    for (offset, length) in [(0, 1), (32, 1), (58, 2), (52, 8)] {
        assert_eq!(registers.write_config(offset, &vec![0; length]), Effect::WriteConfig);
    }
    for (offset, length) in [(60, 1), (57, 4), (0, 3), (0, 0), (usize::MAX, 2)] {
        let effect = registers.write_config(offset, &vec![0; length]);
        assert_eq!(effect, Effect::Refused(Refusal::ConfigBounds), "{offset} {length}");
    }
}

#[test]
fn reset_brings_everything_back_but_the_configuration() {
    let mut registers = registers_at(0xb);
    registers.begin_config_change();
    registers.end_config_change(&[9; 60]);
    for (reg, value) in [
        (Reg::QueueSize, 8),
        (Reg::QueueDesc(Half::Low), 0x1000),
        (Reg::QueueReady, 1),
        (Reg::DeviceFeaturesSel, 1),
        (Reg::ShmSel, 1),
        (Reg::QueueSel, 1),
    ] {
        write(&mut registers, reg, value);
    }
    assert_eq!(registers.write(Reg::Status, 0xf), Effect::Activate);
    assert!(registers.note_config_interrupt());
    assert_eq!(registers.write(Reg::Status, 0), Effect::Reset);

    let mut fresh = self::registers();
    fresh.config = vec![9; 60];
    fresh.generation = 2;
    assert_eq!(format!("{registers:?}"), format!("{fresh:?}"));
}

#[test]
fn broken_device_shows_needs_reset_until_the_reset_and_then_agrees_to_nothing() {
    let mut registers = registers_at(0xf);
    registers.mark_broken();
    assert_eq!(registers.read(Reg::Status), 0x4f);
    assert_eq!(registers.write(Reg::Status, 0), Effect::Reset);
    assert_eq!(registers.read(Reg::Status), 0);
    take_features(&mut registers, 1 << 32);
    write(&mut registers, Reg::Status, 0x1);
    write(&mut registers, Reg::Status, 0x3);
    assert_eq!(registers.write(Reg::Status, 0xb), Effect::Refused(Refusal::DeviceBroken));
    assert_eq!(registers.read(Reg::Status), 0x3);
}

#[test]
fn reset_device_shows_no_needs_reset_whatever_happens_to_it() {
    let mut registers = registers_at(0x0);
    registers.mark_broken();
    assert_eq!(registers.read(Reg::Status), 0);
    let mut registers = registers_at(0x3);
    registers.need_reset();
    assert_eq!(registers.read(Reg::Status), 0x43);
    assert_eq!(registers.write(Reg::Status, 0), Effect::Reset);
    write(&mut registers, Reg::Status, 0x1);
    write(&mut registers, Reg::Status, 0x3);
    take_features(&mut registers, 1 << 32);
    write(&mut registers, Reg::Status, 0xb);
}

#[test]
fn driver_that_gave_up_can_only_reset() {
    let mut registers = registers_at(0xb);
    write(&mut registers, Reg::Status, 0x8b);
    assert_eq!(registers.write(Reg::QueueSize, 8), Effect::Refused(Refusal::QueueLocked));
    assert_eq!(registers.write(Reg::Status, 0x8f), Effect::Refused(Refusal::IllegalStatus));
    assert_eq!(registers.write(Reg::Status, 0), Effect::Reset);
    assert_eq!(registers.read(Reg::Status), 0);
}

#[test]
fn registers_that_cannot_be_written_say_so() {
    for reg in [Reg::DeviceId, Reg::VendorId, Reg::DeviceFeatures, Reg::QueueSizeMax, Reg::ConfigGeneration] {
        assert_eq!(registers().write(reg, 1), Effect::Refused(Refusal::ReadOnly), "{reg:?}");
    }
}
