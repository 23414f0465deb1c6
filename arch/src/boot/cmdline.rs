//! Changes to the kernel's command line that the machine needs.
//!
//! * Parameters of the machine are inserted before `--`, because everything after `--` is for init.
//! * A parameter that would leave the guest without interrupts is removed.
//!
//! Pure.

use std::ops::Range;

use crate::platform::Discovery;

/// The command line `given` with `parameters` added. If `--` ends the kernel's own parameters, they go before
/// it.
pub fn with_parameters(given: &str, parameters: &[String]) -> String {
    if parameters.is_empty() {
        return given.to_owned();
    }
    let end = words(given).into_iter().find(|word| given.get(word.clone()) == Some("--"));
    let (kernel, init) =
        given.split_at_checked(end.map_or(given.len(), |word| word.start)).unwrap_or((given, ""));
    let all = [kernel.trim_end(), &parameters.join(" "), init];
    all.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
}

/// The command line `given` without parameters that switch off the IOAPIC, and one warning for each of them.
/// There are also warnings for other parameters that hide devices from the guest.
///
/// A machine that ACPI tables describe has no other interrupt controller for its devices. Such parameters
/// come from command lines for other machines.
pub fn servable(given: &str, discovery: Discovery, has_pci: bool) -> (String, Vec<String>) {
    let mut line = given.to_owned();
    let mut said = Vec::new();
    if has_pci && has(given, "pci=off") {
        said.push("with `pci=off` on its command line the guest finds none of its PCI devices".to_owned());
    }
    if discovery == Discovery::Cmdline {
        return (line, said);
    }
    let kernel = words(given).into_iter().take_while(|word| given.get(word.clone()) != Some("--"));
    for word in kernel.collect::<Vec<_>>().into_iter().rev() {
        let parameter = given.get(word.clone()).unwrap_or_default();
        match parameter {
            "noapic" | "nosmp" | "maxcpus=0" => {
                let instead = if parameter == "noapic" { "" } else { "maxcpus=1" };
                line.replace_range(word, instead);
                said.push(format!(
                    "`{parameter}` is taken out of the kernel's command line{}: it switches off the IOAPIC, by which all \
                     interrupts of this machine come (with --discovery cmdline there are 8259s, too)",
                    if instead.is_empty() { String::new() } else { format!(" for `{instead}`") }
                ));
            }
            "nolapic" | "disableapic" | "acpi=off" | "acpi=noirq" | "acpi=ht" => said.push(format!(
                "with `{parameter}` on its command line the guest finds no interrupts: this machine is described by ACPI \
                 tables (with --discovery cmdline it is not)"
            )),
            _ => {}
        }
    }
    (line, said)
}

/// Whether the kernel's part of the line has a parameter that starts with `parameter`.
pub(crate) fn has(line: &str, parameter: &str) -> bool {
    let words = words(line).into_iter().map(|word| line.get(word).unwrap_or_default());
    words.take_while(|word| *word != "--").any(|word| word.starts_with(parameter))
}

/// The words of a command line. Spaces separate words, except between double quotes.
fn words(line: &str) -> Vec<Range<usize>> {
    let mut words = Vec::new();
    let (mut start, mut quoted) = (None, false);
    for (at, c) in line.char_indices() {
        quoted ^= c == '"';
        if quoted || !c.is_ascii_whitespace() {
            start.get_or_insert(at);
        } else if let Some(start) = start.take() {
            words.push(start..at);
        }
    }
    words.extend(start.map(|start| start..line.len()));
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_of_ours_go_before_those_of_init() {
        let ours = ["a=1".to_owned(), "b=2".to_owned()];
        for (given, expected) in [
            ("quiet", "quiet a=1 b=2"),
            ("", "a=1 b=2"),
            ("quiet  ", "quiet a=1 b=2"),
            ("quiet init=/x -- /etc/passwd --", "quiet init=/x a=1 b=2 -- /etc/passwd --"),
            ("quiet --", "quiet a=1 b=2 --"),
            ("-- x", "a=1 b=2 -- x"),
            ("dyndbg=\"a -- b\" c--d --e", "dyndbg=\"a -- b\" c--d --e a=1 b=2"),
            ("größe=1\t--\tx", "größe=1 a=1 b=2 --\tx"),
        ] {
            assert_eq!(with_parameters(given, &ours), expected);
        }
        assert_eq!(with_parameters(" quiet -- x", &[]), " quiet -- x");
    }

    #[test]
    fn what_switches_off_the_ioapic_is_taken_out_where_there_is_no_other_controller() {
        let given = "console=ttyS0 noapic nosmp x=\"noapic \" -- noapic";
        let (line, said) = servable(given, Discovery::Acpi, false);
        assert_eq!(line, "console=ttyS0  maxcpus=1 x=\"noapic \" -- noapic");
        assert!(said.len() == 2 && said[1].starts_with("`noapic` is taken out"), "{said:?}");
        assert_eq!(servable(given, Discovery::Cmdline, true), (given.to_owned(), Vec::new()));
        let (line, said) = servable("acpi=off quiet", Discovery::Acpi, true);
        assert!(line == "acpi=off quiet" && said[0].contains("finds no interrupts"), "{said:?}");
        assert_eq!(
            servable("quiet noapic=1", Discovery::Acpi, false),
            ("quiet noapic=1".to_owned(), Vec::new())
        );
        let (_, said) = servable("pci=off quiet", Discovery::Acpi, true);
        assert!(said[0].contains("none of its PCI devices"), "{said:?}");
        assert_eq!(servable("pci=off quiet", Discovery::Acpi, false).1, Vec::<String>::new());
    }
}
