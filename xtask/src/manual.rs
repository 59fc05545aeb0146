// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Manual pages, generated from the command line and the `manual.roff` of a program.

use clap_mangen::Man;

use crate::programs::Program;

/// The sections that the pages of all devices share.
const DEVICE: &str = include_str!("device.roff");
/// clap's heading of the text after the options.
const EXTRA: &str = ".SH EXTRA\n";
const NOTES: &str = ".SH NOTES\n";
const VERSION: &str = ".SH VERSION\n";

/// The file name and the source of a page.
pub type Page = (String, String);

/// The pages that belong to no program.
pub const OTHERS: &[(&str, &str)] = &[("vhost-device-control.7", include_str!("control.roff"))];

/// Generates the pages of a program and of its subcommands.
pub fn pages(program: &Program) -> Result<Vec<Page>, String> {
    let mut command = (program.command)().disable_help_subcommand(true);
    let mut sections = program.manual.to_owned();
    match program.device {
        Some(device) => {
            let name = program.name.replace('-', "\\-");
            let common = DEVICE.replace("@PROGRAM@", &name);
            sections += &common.replace("@TYPE@", device);
        }
        // The sections contain the text after the options in more detail.
        None => command = command.after_long_help(None),
    }
    command.build();
    let mut pages = Vec::new();
    add(&command, &sections, &mut pages)?;
    Ok(pages)
}

fn add(command: &clap::Command, sections: &str, pages: &mut Vec<Page>) -> Result<(), String> {
    for subcommand in command.get_subcommands() {
        add(subcommand, sections, pages)?;
    }
    let page = Man::new(command.clone()).manual("vhost-device");
    let mut text = Vec::new();
    page.render(&mut text)
        .map_err(|error| format!("cannot generate the manual page: {error}"))?;
    let text = String::from_utf8_lossy(&text).replace(EXTRA, NOTES);
    let end = text.find(VERSION).unwrap_or(text.len());
    let (before, version) = text.split_at(end);
    pages.push((page.get_filename(), [before, sections, version].concat()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs::PROGRAMS;

    #[test]
    fn each_page_has_the_usual_sections() {
        let pages = PROGRAMS.iter().flat_map(|program| pages(program).unwrap());
        let mut count = 0;
        for (name, text) in pages {
            for section in [
                "NAME",
                "SYNOPSIS",
                "DESCRIPTION",
                "OPTIONS",
                "EXAMPLES",
                "\"EXIT STATUS\"",
                "FILES",
                "\"SEE ALSO\"",
            ] {
                let heading = format!(".SH {section}");
                let found = text.lines().filter(|line| *line == heading).count();
                assert_eq!(found, 1, "{name}: {heading}");
            }
            for part in ["@PROGRAM@", "@TYPE@", EXTRA] {
                assert!(!text.contains(part), "{name}: {part}");
            }
            count += 1;
        }
        assert!(count > PROGRAMS.len(), "subcommands have pages");
    }
}
