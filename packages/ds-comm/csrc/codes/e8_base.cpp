// The E8 code compiled for what every processor of the family has.
#include "e8.h"

namespace ds_comm {

constexpr E8Table kBaseE8 = e8_table();

}  // namespace ds_comm
