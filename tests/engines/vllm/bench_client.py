"""``vllm bench serve`` of an installed release, without the rest of its command line.

The parser and the client are the release's own. The other commands of ``vllm`` import the packages
of the HTTP server, which the CPU environment does not have. If vLLM's own command finds no other
platform, it takes the CPU; this program does the same.
"""

from vllm import platforms

if platforms.current_platform.is_unspecified():
    from vllm.platforms.cpu import CpuPlatform

    platforms.current_platform = CpuPlatform()

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
