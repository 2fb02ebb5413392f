// The codes compiled for what every processor of the family has.
#include "blocks.h"
#include "e8.h"

namespace ds_comm {

constexpr Table kBase = {e8_codes(), block_codes()};

}  // namespace ds_comm
